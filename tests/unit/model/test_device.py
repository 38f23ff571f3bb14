# SPDX-License-Identifier: Apache-2.0
"""A process computes on its own GPU, or on the CPU where there is none or the user asks for it."""

import pytest
import torch

from llm_trainer.model import device
from llm_trainer.model.device import Device, find_device, find_free_memory


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
