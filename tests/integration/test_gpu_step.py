# SPDX-License-Identifier: Apache-2.0
"""What a GPU has to do for a step of an 8B Llama, followed on tensors without numbers: kernels, bytes, waits.

    .venv/bin/pytest -s tests/integration/test_gpu_step.py

The trainer is the one of a job, with LoRA of rank 16 and 8,192 tokens in rows of 1,024. A layer is what two layers need
more than one. Attention and each of Liger's kernels count as one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "support/fake_cuda"
LAYERS = 32
# What an H100 reaches of its 3.35 TB/s and 989 TFLOP/s, by which the first release was judged.
BYTES_A_SECOND, FLOPS_A_SECOND = 2.6e12, 620e12
FIRST_KERNELS, FIRST_OTHER_MS, FIRST_PRODUCTS_MS = 171, 352, 372  # of the first release, without recomputation
LORA, FIRST = {"lora_r": 16}, {"lora_r": 16, "lora_dropout": 0.1}  # dropout keeps casts, and adapters for themselves
CASES = {
    "default": {"settings": LORA},
    "first": {"settings": FIRST},
    "first, recomputed": {"settings": FIRST, "recomputes": True},
}
KERNELS = {"torch's": {}}
if find_spec("flash_attn"):
    KERNELS["flash-attn's own Python"] = {"attention": "flash_attention_2"}
if find_spec("liger_kernel"):
    KERNELS["Liger's own Python"] = {"own_liger": True}

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a CUDA of its own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler `g++` here"),
]


@dataclass(frozen=True)
class Layer:
    """What a decoder layer takes, forward and backward."""

    kernels: int
    flops: int
    other_bytes: int  # of all but attention and the products of large matrices

    @property
    def other_ms(self):
        """Of all layers."""
        return 1000 * LAYERS * self.other_bytes / BYTES_A_SECOND

    @property
    def products_ms(self):
        return 1000 * LAYERS * self.flops / FLOPS_A_SECOND


@pytest.fixture(scope="module")
def follow(tmp_path_factory):
    """Follows steps of these cases in a process of its own, where torch finds a GPU."""
    guard = tmp_path_factory.mktemp("fake-cuda") / "guard.so"
    headers = Path(torch.__file__).parent / "include"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-isystem", headers, FOLDER / "guard.cpp", "-o", guard]
    subprocess.run(command, check=True)

    def run(*cases):
        command = [sys.executable, FOLDER / "fake_gpu.py", guard, FOLDER / "traced_step.py", *map(json.dumps, cases)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module", params=KERNELS)
def layers(follow, request):
    cases = [{**case, "layers": layers, **KERNELS[request.param]} for case in CASES.values() for layers in (1, 2)]
    steps = follow(*cases)
    assert {step["ended"] for step in steps} == {"the step is over"}
    assert [step["waits"] for step in steps] == [{}] * len(steps)
    return dict(zip(CASES, map(subtract, steps[::2], steps[1::2]), strict=True))


def subtract(one, two):
    """What the second layer takes. PyTorch's copy of flash attention fills two numbers, which are not counted."""
    kernels, size = (Counter(two[name]) for name in ("kernels", "bytes"))
    kernels.subtract(one["kernels"]), size.subtract(one["bytes"])
    other = sum(number for name, number in size.items() if name != "products" and "varlen" not in name)
    return Layer(kernels.total() - kernels["zeros"], two["flops"] - one["flops"], other)


def test_the_first_release_is_followed_to_what_it_took(layers):
    first, recomputed = layers["first"], layers["first, recomputed"]
    assert first.kernels == FIRST_KERNELS
    assert first.other_ms == pytest.approx(FIRST_OTHER_MS, rel=0.03)  # Liger's own kernels count what is in place once
    assert first.products_ms == pytest.approx(FIRST_PRODUCTS_MS, rel=0.01)
    assert recomputed.flops == pytest.approx(1.5 * first.flops, rel=0.01)
    assert recomputed.kernels > 1.4 * first.kernels
    assert recomputed.other_bytes > 1.4 * first.other_bytes


def test_a_layer_takes_at_most_so_many_kernels_and_bytes(layers):
    default, first = layers["default"], layers["first"]
    print(f"\n{default}: {default.other_ms:.0f} ms besides products, which take {default.products_ms:.0f} ms")
    assert default.flops == first.flops
    assert default.kernels <= 0.6 * FIRST_KERNELS
    assert default.other_bytes <= 0.6 * first.other_bytes
    assert default.other_ms <= 150


def test_a_host_that_knows_nothing_of_its_batch_asks_the_gpu(follow):
    (step,) = follow({"settings": LORA, "layers": 1, "finds_facts": False})
    assert step["ended"].startswith("the host asks for numbers")
    assert step["waits"]
