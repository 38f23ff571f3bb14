# SPDX-License-Identifier: Apache-2.0
"""The peak of a CPU process is what tensors took, also those that were given back, and nothing that malloc keeps."""

import time
from types import SimpleNamespace

import torch

from llm_trainer.model.memory import peak
from llm_trainer.model.memory.peak import Peak, count_used_bytes, read_status

CPU, MIB = torch.device("cpu"), 2**20


def test_tensors_that_were_given_back_are_in_the_peak():
    watched, deadline = Peak(CPU), time.monotonic() + 60
    taken = torch.ones(64 * MIB // 4)
    while watched.highest_bytes - watched.before_bytes < 60 * MIB and time.monotonic() < deadline:
        time.sleep(0.01)  # its own thread sees it
    del taken
    before = count_used_bytes()
    assert 60 * MIB < watched.read_bytes() < 90 * MIB
    again = torch.ones(8 * MIB // 4)
    assert count_used_bytes() - before > 7 * MIB
    assert again.sum() == 8 * MIB // 4


def test_what_malloc_keeps_does_not_count(monkeypatch):
    info = SimpleNamespace(uordblks=100, hblkhd=20, fordblks=5000)
    monkeypatch.setattr(peak, "LIBC", SimpleNamespace(mallinfo2=lambda: info))
    monkeypatch.setattr(peak, "count_mapped_bytes", lambda: 3)
    monkeypatch.setattr(peak, "read_status", {"RssShmem": 4, "VmRSS": 9999}.get)
    assert count_used_bytes() == 127
    monkeypatch.setattr(peak, "LIBC", SimpleNamespace())
    assert count_used_bytes() == 9999


def test_mapped_weights_count_also_after_a_training_has_written_them(tmp_path):
    file = tmp_path / "weights with spaces"
    file.write_bytes(bytes(64 * MIB))
    before = count_used_bytes()
    weights = torch.from_file(str(file), shared=False, size=64 * MIB // 4)
    assert 63 * MIB < count_used_bytes() - before < 65 * MIB
    weights.add_(1)  # each page becomes a copy in the process's own memory
    assert 63 * MIB < count_used_bytes() - before < 65 * MIB
    del weights
    assert count_used_bytes() - before < MIB


def test_sizes_are_read_in_bytes(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nRssShmem:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    monkeypatch.setattr(peak, "Path", lambda path: status)
    assert (read_status("RssShmem"), read_status("VmRSS")) == (2048 * 1024, 1024 * 1024)


def test_a_gpu_counts_by_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *a: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *a: 12345)
    watched = Peak(SimpleNamespace(type="cuda"))
    assert calls == ["reset"]
    assert watched.read_bytes() == 12345
