# SPDX-License-Identifier: Apache-2.0
"""What a process computes on, as far as the choice of types and kernels depends on it."""

from dataclasses import dataclass

import torch

from llm_trainer.common.ranks import local_rank
from llm_trainer.config.schema import Settings
from llm_trainer.host.machine import find_available_memory


@dataclass(frozen=True)
class Device:
    """A CPU, or an NVIDIA GPU with its CUDA compute capability, as in (9, 0) for an H100."""

    torch: torch.device
    name: str = "the CPU"
    capability: tuple[int, int] | None = None  # None: no GPU

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})" if self.capability else self.name


def find_device(settings: Settings) -> Device:
    """The device of this process: its own GPU, unless there is none or the settings ask for the CPU."""
    if settings.parallelism.use_cpu or not torch.cuda.is_available():
        return Device(torch.device("cpu"))
    device = torch.device("cuda", local_rank())
    return Device(device, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def find_free_memory(device: Device) -> int:
    """Bytes that this process can still take of the GPU's memory, or all processes together of the host's."""
    if device.is_gpu:
        free_bytes, _ = torch.cuda.mem_get_info(device.torch)
        return free_bytes
    return find_available_memory()
