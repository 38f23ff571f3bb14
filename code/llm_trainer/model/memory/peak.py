# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a process from a moment on: torch's allocations on a GPU, the resident set on a CPU."""

import contextlib
from pathlib import Path

import torch


class Peak:
    """The peak from the creation of this object on."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.before_bytes = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before_bytes = read_status("VmRSS")
            reset_high_water_mark()

    def read_bytes(self) -> int:
        """Return the peak so far in bytes. On a CPU it is counted above the resident set at the beginning."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return read_status("VmHWM") - self.before_bytes


def read_status(name: str) -> int:
    """Return a size of this process that the kernel reports, in bytes, such as `VmRSS`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset_high_water_mark() -> None:
    """Have VmHWM begin again at VmRSS (Linux, Documentation/filesystems/proc.rst)."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it; then the mark stays the whole process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
