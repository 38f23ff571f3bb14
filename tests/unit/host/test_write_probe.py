# SPDX-License-Identifier: Apache-2.0
"""A folder that takes no file is found before the job starts, root or not."""

import os
import subprocess
import tempfile

import pytest

from llm_trainer.host.write_probe import find_temp_problem, find_write_problem
from support.small_disk import small_disk


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path):
    assert find_write_problem(tmp_path) is None
    assert find_write_problem(tmp_path / "not/made/yet") is None
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_mount(tmp_path):
    with small_disk(tmp_path / "disk", 1024) as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        expected = f"{folder} is on a read-only file system: mount it writable."
        assert find_write_problem(folder) == find_write_problem(folder / "checkpoints") == expected


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere; the image tests run this as another user")
def test_a_folder_of_another_user(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    problem = find_write_problem(tmp_path / "closed/below")
    assert (
        problem
        == f"user {os.getuid()} cannot write to {tmp_path / 'closed'}: mount it writable, or run as another user."
    )


def test_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", 64) as folder:
        with pytest.raises(OSError):
            (folder / "filler").write_bytes(bytes(10**6))
        assert find_write_problem(folder).startswith(f"a trial write found no space on the disk of {folder} (0.00 of")


def test_a_file_and_a_link_to_nowhere_in_the_path(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    assert find_write_problem(tmp_path / "file/below") == f"{tmp_path / 'file'} is a file: give a folder."
    assert find_write_problem(tmp_path / "link") == (
        f"{tmp_path / 'link'} is a link to /nowhere/at/all, which is not there: remove the link, or make its target."
    )
    assert "is a link to loop" in find_write_problem(tmp_path / "loop/below")


def test_no_folder_for_temporary_files(monkeypatch):
    assert find_temp_problem() is None
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/1"])
    assert find_temp_problem().startswith("no folder for temporary files takes one (No usable temporary directory")
