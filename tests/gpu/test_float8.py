# SPDX-License-Identifier: Apache-2.0
"""A GPU's products in float8 are those that the CPU emulates, and a kernel rounds as PyTorch does."""

import pytest
import torch
from torch import nn

from llm_trainer.model.layers import float8

SHAPES = [(5, 48), (300, 4096), (7, 14_336), (1, 16)]


@pytest.fixture
def gpu(device):
    if device.type != "cuda" or torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("float8 needs a GPU of compute capability 8.9")
    return device


def measure(found, exact):
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_rounds_as_pytorch_does(shape, dtype, gpu):
    wide = torch.randn(shape[0], 2 * shape[1], dtype=dtype)
    wide[2:3] = 0
    for matrix in (wide[:, : shape[1]], wide[:, ::2], wide.t()[: shape[1]]):
        numbers, scales = float8.scale_rows(matrix)
        on_gpu, scales_on_gpu = float8.scale_rows(wide.to(gpu).as_strided(matrix.shape, matrix.stride()))
        torch.testing.assert_close(scales_on_gpu.cpu(), scales)
        found = on_gpu.cpu().float()
        torch.testing.assert_close(found, numbers.float(), rtol=2**-3, atol=2**-9)  # neighbours at most
        assert (found != numbers.float()).sum() <= 0.01 * found.numel()


@pytest.mark.parametrize("num_tokens", [1, 17, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_the_cpu_emulates(num_tokens, bias, gpu):
    torch.manual_seed(0)
    layer = nn.Linear(4096, 1024, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(num_tokens, 4096, dtype=torch.bfloat16)
    gradient = torch.randn(num_tokens, 1024, dtype=torch.bfloat16)
    results = []
    for place in (torch.device("cpu"), gpu):
        converted = float8.Float8Linear(layer.to(place))
        given = x.detach().to(place).requires_grad_()  # a leaf of its own on either device
        out = converted(given)
        out.backward(gradient.to(place))
        results.append((out.detach().cpu(), given.grad.cpu()))
    for emulated, found in zip(*results, strict=True):
        print(f"{num_tokens} tokens: off by {measure(found, emulated):.1e}")
        assert measure(found, emulated) < 0.02
