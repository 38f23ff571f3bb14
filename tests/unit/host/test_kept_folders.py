# SPDX-License-Identifier: Apache-2.0
"""A kept folder is whole once it has its name, and what is damaged is made anew."""

import pytest

from llm_trainer.host import kept_folders
from llm_trainer.host.kept_folders import find_folder, publish_folder, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))


def keep(text):
    folder = find_folder("letters", "key", "The letters")
    return write_folder(folder, lambda unfinished: (unfinished / "a.txt").write_text(text), "writing letters")


def test_what_was_kept_is_found_by_its_key():
    assert not find_folder("letters", "key", "The letters").exists()
    folder = keep("a")
    assert find_folder("letters", "key", "The letters") == folder
    assert (folder / "a.txt").read_text() == "a"


def test_what_is_damaged_is_gone_with_a_warning(capsys):
    (keep("a") / "a.txt").write_text("b")
    assert not find_folder("letters", "key", "The letters").exists()
    assert "Warning: The letters kept in" in capsys.readouterr().out


def test_a_failure_leaves_nothing(tmp_path):
    folder = find_folder("letters", "key", "The letters")
    with pytest.raises(ZeroDivisionError):
        write_folder(folder, lambda unfinished: 1 / 0, "writing letters")
    assert list(folder.parent.iterdir()) == []


def test_the_folder_of_the_first_stays(tmp_path):
    folder = keep("a")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "a.txt").write_text("b")
    publish_folder(unfinished, folder)
    assert (folder / "a.txt").read_text() == "a"


def test_a_folder_that_another_job_removes_before_it_is_held_is_made_again(monkeypatch):
    taken = []

    def remove_first(folder):
        if folder.name.startswith(".") and not taken:
            taken.append(folder)
            folder.rmdir()

    monkeypatch.setattr(kept_folders, "hold_folder", remove_first)
    folder = keep("a")
    assert (folder / "a.txt").read_text() == "a"
    assert not taken[0].exists()
