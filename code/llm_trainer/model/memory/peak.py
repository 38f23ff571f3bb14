# SPDX-License-Identifier: Apache-2.0
"""The peak memory that tensors take in a process from a moment on: torch's allocations on a GPU, malloc's on a CPU.

A CPU's resident set is no measure of it. malloc keeps what has been freed, in gaps that the next batch may not fit.
"""

import ctypes
import threading
import time
import weakref
from pathlib import Path

import torch

WATCH_SECONDS = 0.02  # between two readings, at least
IDLE_TIMES = 50  # so many times as long as a reading, at least: malloc goes through all its gaps, locked


class Peak:
    """The peak from the creation of this object on."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.before_bytes = self.highest_bytes = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before_bytes = self.highest_bytes = count_used_bytes()
            threading.Thread(target=watch, args=(weakref.ref(self),), daemon=True).start()

    def read_bytes(self) -> int:
        """Return the peak so far in bytes. On a CPU it is counted above what was used at the beginning."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        self.note_use()
        return self.highest_bytes - self.before_bytes

    def note_use(self) -> None:
        """Note what is used now."""
        self.highest_bytes = max(self.highest_bytes, count_used_bytes())


def watch(peak: "weakref.ref[Peak]") -> None:
    """Have a peak note what is used, again and again, for as long as somebody has it."""
    while (alive := peak()) is not None:
        began = time.monotonic()
        alive.note_use()
        del alive
        time.sleep(max(WATCH_SECONDS, IDLE_TIMES * (time.monotonic() - began)))


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2 (malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


LIBC = ctypes.CDLL(None)
if hasattr(LIBC, "mallinfo2"):  # glibc 2.33 and later
    LIBC.mallinfo2.restype = MallocInfo


def count_used_bytes() -> int:
    """Return what malloc has given out and not got back, mapped files, such as weights, and shared memory.

    Where malloc does not tell, the resident set comes back.
    """
    if not hasattr(LIBC, "mallinfo2"):
        return read_status("VmRSS")
    info = LIBC.mallinfo2()
    return info.uordblks + info.hblkhd + count_mapped_bytes() + read_status("RssShmem")


def count_mapped_bytes() -> int:
    """Return the size of files that are mapped to be changed in memory alone, as weights are.

    Their resident part would lose each page that a training writes: the kernel makes a copy that is no file's.
    """
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    mappings = (line.split(maxsplit=5) for line in lines if " rw-p " in line)
    spans = (addresses.split("-") for addresses, _, _, _, inode, *_ in mappings if inode != "0")
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def read_status(name: str) -> int:
    """Return a size of this process that the kernel reports, in bytes, such as `VmRSS`; 0 where it does not."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
