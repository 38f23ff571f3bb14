# SPDX-License-Identifier: Apache-2.0
"""A cache folder is trusted where nobody else could write to it and nothing has changed, and kept while in use."""

import os
import subprocess
import sys

import pytest

from llm_trainer.host.sealed_folders import (
    SEAL,
    find_damage,
    hold_folder,
    is_private,
    make_private_folder,
    measure_folder,
    remove_oldest,
    seal_folder,
)


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o700)
    (folder / "rows").write_bytes(b"abc" * 1000)
    (folder / "report").write_text("{}")
    seal_folder(folder, "key")
    return folder


def test_a_folder_is_sound_until_something_changes(sealed):
    assert find_damage(sealed, "key") == ""
    assert find_damage(sealed, "another") == "belongs to other data"
    content = bytearray((sealed / "rows").read_bytes())
    content[1500] ^= 1
    (sealed / "rows").write_bytes(content)
    assert find_damage(sealed, "key") == "has a damaged rows"
    (sealed / "rows").unlink()
    assert find_damage(sealed, "key") == "is not whole"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"label": "key"}', '{"label": "key", "checksums": [1]}'])
def test_a_folder_without_a_whole_seal_is_not_trusted(sealed, content):
    (sealed / SEAL).write_text(content)
    assert find_damage(sealed, "key") == "is not whole"


def test_only_a_folder_of_this_user_alone_is_private(tmp_path, sealed):
    assert is_private(sealed)
    (tmp_path / "link").symlink_to(sealed)
    assert not is_private(tmp_path / "link")
    sealed.chmod(0o777)
    assert not is_private(sealed)
    assert find_damage(sealed, "key") == "could be written by others"
    assert not is_private(tmp_path / "none")
    if os.getuid() == 0:
        sealed.chmod(0o700)
        os.chown(sealed, 12345, 12345)
        assert not is_private(sealed)


def test_a_substitute_is_made_for_a_folder_that_others_could_write_to(tmp_path, capsys):
    assert make_private_folder(tmp_path / "a/own") == tmp_path / "a/own"
    assert make_private_folder(tmp_path / "a/own") == tmp_path / "a/own"
    (tmp_path / "a/own").chmod(0o777)
    substitute = make_private_folder(tmp_path / "a/own")
    assert substitute != tmp_path / "a/own"
    assert is_private(substitute)
    assert "could be written by others" in capsys.readouterr().out


def test_the_oldest_folders_go_first_and_those_in_use_never(tmp_path):
    for age, name in enumerate(["new", "held", "old", ".unfinished", "oldest"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1_000_000 - age, 1_000_000 - age))
    os.utime(tmp_path / "held", (0, 0))
    hold = "import sys; from pathlib import Path; from llm_trainer.host.sealed_folders import hold_folder\n"
    hold += "hold_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "held")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        remove_oldest(tmp_path, 300)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "new", "old"]
        remove_oldest(tmp_path, 0)
        assert [path.name for path in tmp_path.iterdir()] == ["held"]
        process.stdin.close()
    remove_oldest(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_can_be_asked_for(tmp_path):
    hold_folder(tmp_path / "none")
    assert find_damage(tmp_path / "none", "key") == "could be written by others"
    assert measure_folder(tmp_path / "none") == 0  # another job has finished it since it was listed
