# SPDX-License-Identifier: Apache-2.0
"""A process computes on its own GPU, or on the CPU where there is none or the user asks for it."""

import pytest
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.model import device
from llm_trainer.model.device import Device, find_device, find_free_memory, find_missing_kernels

# What torch 2.13 is built for by CUDA 13, and what it was by CUDA 12.6.
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine of two GPUs, on which this process is the second worker."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000 + index.index, 5000))
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_a_process_has_its_own_gpu(two_gpus):
    found = find_device(use_cpu=False)
    assert found == Device(torch.device("cuda", 1), "GPU 1", (9, 0))
    assert found.is_gpu
    assert str(found) == "GPU 1 (9.0)"
    assert find_free_memory(found) == 1001


def test_the_cpu_is_taken_where_it_is_asked_for_or_alone(two_gpus, monkeypatch):
    monkeypatch.setattr(device, "find_available_memory", lambda: 77)
    cpu = find_device(use_cpu=True)
    assert cpu == Device(torch.device("cpu"))
    assert (cpu.is_gpu, str(cpu), find_free_memory(cpu)) == (False, "the CPU", 77)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(use_cpu=False) == cpu


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), CUDA_13, False),  # a V100
        ((7, 0), CUDA_12, True),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # an L40S, with sm_86
        ((9, 0), CUDA_13, True),
        ((10, 3), CUDA_13, True),  # a B300, with sm_100
        ((10, 0), CUDA_12, False),
        ((13, 0), CUDA_13, True),  # compiled from PTX
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a", "compute_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), [], True),  # a CPU build has no list
    ],
)
def test_a_gpu_needs_kernels_of_its_own(capability, architectures, runs):
    gpu = Device(torch.device("cuda", 0), "GPU", capability)
    assert (find_missing_kernels(gpu, architectures) is None) == runs
    assert find_missing_kernels(Device(torch.device("cpu")), architectures) is None


def test_a_gpu_without_kernels_is_told_in_a_sentence(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    with pytest.raises(UserError) as caught:
        find_device(use_cpu=False)
    assert str(caught.value) == (
        "Tesla V100-SXM2-16GB (7.0) is a GPU that this image's torch has no kernels for (it has sm_75, sm_80, sm_86, "
        "sm_90, sm_100, sm_120, compute_120): use another instance type, or an image for this GPU."
    )
    assert find_device(use_cpu=True) == Device(torch.device("cpu"))
