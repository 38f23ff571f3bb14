# SPDX-License-Identifier: Apache-2.0
"""The device of a process, as far as the choice of number types and kernels depends on it."""

from dataclasses import dataclass

import torch

from llm_trainer.common.ranks import local_rank
from llm_trainer.host.machine import find_available_memory


@dataclass(frozen=True)
class Device:
    """A CPU, or an NVIDIA GPU with its CUDA compute capability, such as (9, 0) for an H100."""

    torch: torch.device
    name: str = "the CPU"
    capability: tuple[int, int] | None = None  # a CPU has none

    @property
    def is_gpu(self) -> bool:
        """True for an NVIDIA GPU."""
        return self.capability is not None

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})" if self.capability else self.name


def find_device(use_cpu: bool) -> Device:
    """Return this process's own GPU, or the CPU where there is no GPU or `use_cpu` is set."""
    if use_cpu or not torch.cuda.is_available():
        return Device(torch.device("cpu"))
    device = torch.device("cuda", local_rank())
    return Device(device, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def find_free_memory(device: Device) -> int:
    """Return the bytes that this process can still take on its GPU, or all processes together on the CPU."""
    if device.is_gpu:
        free_bytes, _ = torch.cuda.mem_get_info(device.torch)
        return free_bytes
    return find_available_memory()
