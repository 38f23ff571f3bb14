# SPDX-License-Identifier: Apache-2.0
"""The peak of a CPU process is what the kernel saw, also of memory that was given back."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from llm_trainer.model.memory import peak
from llm_trainer.model.memory.peak import Peak, read_status

CPU, MIB, PAGE = torch.device("cpu"), 2**20, mmap.PAGESIZE


def test_memory_that_was_given_back_is_in_the_peak():
    watched = Peak(CPU)
    if watched.read_bytes() > 8 * MIB:
        pytest.skip("this machine does not let a process reset its high-water mark")
    taken = mmap.mmap(-1, 64 * MIB)  # malloc may have as much left from before
    taken[::PAGE] = b"1" * (64 * MIB // PAGE)
    assert watched.read_bytes() > 48 * MIB
    taken.close()
    assert watched.read_bytes() > 48 * MIB
    assert read_status("VmHWM") >= read_status("VmRSS")


def test_where_the_mark_cannot_be_reset_it_is_that_of_the_whole_process(monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr(peak.Path, "write_text", refuse)
    assert Peak(CPU).read_bytes() >= 0


def test_sizes_are_read_in_bytes(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    monkeypatch.setattr(peak, "Path", lambda path: status)
    assert (read_status("VmHWM"), read_status("VmRSS")) == (2048 * 1024, 1024 * 1024)


def test_a_gpu_counts_by_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *a: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *a: 12345)
    watched = Peak(SimpleNamespace(type="cuda"))
    assert calls == ["reset"]
    assert watched.read_bytes() == 12345
