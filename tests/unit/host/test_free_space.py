# SPDX-License-Identifier: Apache-2.0
"""Free space is found also where a folder is not made yet, and too little of it is told with what to change."""

import os
from types import SimpleNamespace

import pytest

from llm_trainer.common.units import GIB
from llm_trainer.host import free_space
from llm_trainer.host.free_space import (
    describe_lack,
    find_free_bytes,
    find_nearest_folder,
    has_inodes,
    inspect_disk,
)
from support.small_disk import small_disk


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


def test_what_a_disk_has_run_out_of_is_told_apart(tmp_path):
    with small_disk(tmp_path / "disk", 1024) as folder:
        assert describe_lack(folder).startswith(f"found no space on the disk of {folder} (0.00 of 0.00 GB are free)")
        assert describe_lack(folder, over_quota=True).startswith(f"found the quota on {folder} used up (")
        assert has_inodes(folder)
        with pytest.raises(OSError, match="No space left"):
            for number in range(10_000):
                (folder / str(number)).touch()
        assert not has_inodes(folder)
        assert describe_lack(folder / "not made yet") == (
            f"found no inode on the disk of {folder / 'not made yet'} for one more file (10,000 are taken, 0.00 of "
            "0.00 GB are free): put the data into fewer, larger files, or mount a disk with more inodes; a larger "
            "volume has more."
        )
