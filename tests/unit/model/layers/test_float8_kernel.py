# SPDX-License-Identifier: Apache-2.0
"""The kernel in Triton's interpreter, where Triton is installed. tests/gpu/test_float8.py has it on a GPU."""

import importlib

import pytest
import torch

from llm_trainer.model.layers.float8 import scale_rows


@pytest.fixture
def kernel(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return importlib.reload(importlib.import_module("llm_trainer.model.layers.float8_kernel"))


@pytest.mark.parametrize("shape", [(5, 48), (3, 100), (0, 16)])
def test_rows_are_scaled_as_pytorch_scales_them(kernel, shape):
    matrix = torch.randn(shape, dtype=torch.bfloat16)
    matrix[1:2] = 0
    for given in (matrix, matrix.t()[:, ::1].t(), torch.cat([matrix, matrix], 1)[:, : shape[1]]):
        numbers, scales = kernel.scale_rows_on_gpu(given)
        expected, expected_scales = scale_rows(given)
        torch.testing.assert_close(scales, expected_scales)
        # The interpreter drops what a mantissa carries over when it is rounded up; a GPU does not.
        assert (numbers.float() != expected.float()).sum() <= 0.1 * numbers.numel()
