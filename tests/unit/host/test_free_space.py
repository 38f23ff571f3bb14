# SPDX-License-Identifier: Apache-2.0
"""Free space is found also where a folder is not made yet, and too little of it is told with what to change."""

import os
from types import SimpleNamespace

import pytest

from llm_trainer.common.units import GIB
from llm_trainer.host import free_space
from llm_trainer.host.free_space import find_free_bytes, find_nearest_folder, inspect_disk


def test_the_nearest_folder_is_itself_or_the_first_above_that_is_there(tmp_path, monkeypatch):
    assert find_nearest_folder(tmp_path) == tmp_path
    assert find_nearest_folder(tmp_path / "a/b/c") == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert find_nearest_folder(tmp_path / "a/b").samefile(tmp_path / "a")


def test_free_bytes_are_those_that_no_reserve_keeps(tmp_path, monkeypatch):
    asked = []

    def statvfs(folder):
        asked.append(folder)
        return SimpleNamespace(f_bavail=5, f_bfree=9, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert find_free_bytes(tmp_path / "not/there") == 5 * 4096
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("free_bytes", "verdict", "text"),
    [
        (10 * GIB, "ok", "10 GiB free on /data"),
        (
            10 * GIB - 1,
            "warning",
            "10 GiB free on /data, and weights, checkpoints and caches soon take 10 GiB: raise Vol",
        ),
        (GIB // 2, "warning", "512 MiB free on /data, and weights, checkpoints and caches soon take 10 GiB: raise Vol"),
    ],
)
def test_a_disk_of_less_than_ten_gib_is_warned_of(tmp_path, monkeypatch, free_bytes, verdict, text):
    monkeypatch.setattr(free_space, "find_free_bytes", lambda folder: free_bytes)
    finding = inspect_disk("disk", free_space.Path("/data"))
    assert (finding.subject, finding.verdict) == ("disk", verdict)
    assert finding.text.startswith(text)
