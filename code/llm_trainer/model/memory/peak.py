# SPDX-License-Identifier: Apache-2.0
"""The most memory that a process took from a moment on: torch's on a GPU, the resident set on a CPU."""

import contextlib
from pathlib import Path

import torch


class Peak:
    """Watches from its creation on."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.before_bytes = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before_bytes = read_status("VmRSS")
            reset_high_water_mark()

    def read_bytes(self) -> int:
        """The highest so far, above what there was at the beginning on a CPU."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return read_status("VmHWM") - self.before_bytes


def read_status(name: str) -> int:
    """A size that the kernel tells of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset_high_water_mark() -> None:
    """So that VmHWM begins again at VmRSS (Linux, Documentation/filesystems/proc.rst)."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it: then the mark stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
