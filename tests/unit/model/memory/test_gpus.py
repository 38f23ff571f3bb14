# SPDX-License-Identifier: Apache-2.0
"""Ratings of GPUs: whole, plausible beside each other, and each with its source."""

import pytest

from llm_trainer.common.units import GIB
from llm_trainer.model.memory.gpus import find_gpu, read_facts, read_gpus


def test_a_gpu_is_found_by_cudas_name():
    h100 = find_gpu("NVIDIA H100 80GB HBM3")
    assert h100 is read_gpus()["H100"]
    assert (h100.peak_flops, h100.memory_bandwidth, h100.nvlink_bandwidth) == (989.4e12, 3.35e12, 450e9)
    assert find_gpu("NVIDIA GeForce RTX 4090") is None


def test_a_gpu_without_bfloat16_peaks_in_float16():
    assert read_gpus()["T4"].bf16_flops is None
    assert read_gpus()["T4"].peak_flops == 65e12


@pytest.mark.parametrize("gpu", read_gpus().values(), ids=lambda gpu: gpu.name)
def test_ratings_fit_each_other(gpu):
    assert (gpu.bf16_flops is None) == (gpu.capability < (8, 0))
    assert (gpu.fp8_flops is None) == (gpu.capability < (8, 9))
    assert gpu.fp8_flops is None or gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=0.02)
    assert gpu.fp32_flops < gpu.fp16_flops
    assert 10 * GIB < gpu.memory_bytes < 300 * GIB


def test_each_number_has_a_source():
    assert [name for name, facts in read_facts().items() if "https://" not in facts["source"]] == []


# The least of what torch.OutOfMemoryError called the total capacity, on g5.12xlarge and on others' machines.
@pytest.mark.parametrize(
    ("name", "gib"), [("A10G", 21.98), ("L4", 21.96), ("H100", 79.1), ("B300", 267.69), ("GB200", 184.31)]
)
def test_the_memory_is_what_cuda_reports(name, gib):
    assert read_gpus()[name].memory_bytes == int(gib * GIB)


def test_operations_of_blackwell_cards_follow_from_their_float32():
    for name in ("RTX PRO 6000", "RTX PRO 4500"):
        gpu = read_gpus()[name]
        assert (gpu.bf16_flops, gpu.fp8_flops) == (4 * gpu.fp32_flops, 8 * gpu.fp32_flops)
    assert read_facts()["RTX PRO 4500"]["source"].startswith("not checked")
