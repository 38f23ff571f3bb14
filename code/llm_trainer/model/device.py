# SPDX-License-Identifier: Apache-2.0
"""The device of a process, as far as the choice of number types and kernels depends on it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank
from llm_trainer.host.machine import find_available_memory


@dataclass(frozen=True)
class Device:
    """A CPU, or an NVIDIA GPU with its CUDA compute capability, such as (9, 0) for an H100."""

    torch: torch.device
    name: str = "the CPU"
    capability: tuple[int, int] | None = None  # a CPU has none
    is_here: bool = True  # False for a GPU of another machine, on which nothing can be tried

    @property
    def is_gpu(self) -> bool:
        """True for an NVIDIA GPU."""
        return self.capability is not None

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})" if self.capability else self.name


def find_device(use_cpu: bool) -> Device:
    """Return this process's own GPU, or the CPU where there is no GPU or `use_cpu` is set.

    Raises UserError for a GPU that torch has no kernels for.
    """
    if use_cpu or not torch.cuda.is_available():
        return Device(torch.device("cpu"))
    place = torch.device("cuda", local_rank())
    device = Device(place, torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))
    if problem := find_missing_kernels(device, torch.cuda.get_arch_list()):
        raise UserError(problem)
    return device


def find_missing_kernels(device: Device, architectures: Iterable[str]) -> str | None:
    """Return a sentence where none of torch's architectures, such as sm_90, runs on a GPU, else None.

    Machine code (sm) runs on later GPUs of its generation, and PTX (compute) is compiled for all later ones. Code that
    is specific to an architecture (sm_90a) runs on no other.
    """
    made_for = list(architectures)
    if device.capability is None or not made_for:
        return None
    for kind, major, minor, suffix in re.findall(r"\b(sm|compute)_(\d+)(\d)([a-z]?)\b", " ".join(made_for)):
        version, is_portable = (int(major), int(minor)), kind == "compute" and not suffix
        is_near = version[0] == device.capability[0] and suffix != "a"
        if version == device.capability or (version < device.capability and (is_portable or is_near)):
            return None
    return (
        f"{device} is a GPU that this image's torch has no kernels for (it has {', '.join(made_for)}): use another "
        "instance type, or an image for this GPU."
    )


def find_free_memory(device: Device) -> int:
    """Return the bytes that this process can still take on its GPU, or all processes together on the CPU."""
    if device.is_gpu:
        free_bytes, _ = torch.cuda.mem_get_info(device.torch)
        return free_bytes
    return find_available_memory()
