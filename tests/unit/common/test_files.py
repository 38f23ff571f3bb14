# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, and what is removed is gone without harm to what a link names."""

import hashlib

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import (
    compute_digest,
    is_inner_path,
    read_json_object,
    remove_leftover,
    remove_path,
    rename_durably,
    replace_file,
    write_text,
)


def test_a_file_is_replaced_at_once(tmp_path):
    file = tmp_path / "file"
    write_text(file, "earlier")
    with replace_file(file) as unfinished:
        unfinished.write_text("later")
        assert file.read_text() == "earlier"
    assert file.read_text() == "later"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "file"
    write_text(file, "earlier")

    def write_half() -> None:
        with replace_file(file) as unfinished:
            unfinished.write_text("lat")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]


def test_characters_that_utf_8_cannot_hold_are_replaced_where_that_is_asked_for(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "half a pair: \ud83d")
    assert not list(tmp_path.iterdir())
    write_text(tmp_path / "file", "half a pair: \ud83d", errors="replace")
    assert (tmp_path / "file").read_text() == "half a pair: ?"


def test_a_written_file_gets_its_name(tmp_path):
    (tmp_path / "file.part").write_text("all of it")
    rename_durably(tmp_path / "file.part", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_digest_is_sha_256(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert compute_digest(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_files_folders_and_links_are_removed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    for name in ("link", "file", "absent"):
        remove_path(tmp_path / name)
    assert list(tmp_path.iterdir()) == [folder]
    remove_path(folder)
    assert not list(tmp_path.iterdir())


def test_what_nobody_needs_goes_and_what_its_links_name_stays(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "left").mkdir()
    (tmp_path / "left/link").symlink_to(folder)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name in ("left", "link", "file", "absent"):
        remove_leftover(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "inner"]


def test_a_name_out_of_a_file_does_not_lead_out_of_its_folder():
    assert [name for name in ("a", "a/b", "a..b") if not is_inner_path(name)] == []
    bad = ["", ".", "..", "../a", "a/../b", "/a", "a//b", "./a", "a/", "a\0", 7, None]
    assert [name for name in bad if is_inner_path(name)] == []


def test_a_json_object_is_read_and_its_absence_is_an_empty_one(tmp_path):
    (tmp_path / "file").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "file") == {"a": 1}
    assert read_json_object(tmp_path / "absent") == {}


@pytest.mark.parametrize(("content", "sentence"), [("{", "is not valid JSON ("), ("[]", "holds a JSON list: ")])
def test_anything_but_a_json_object_is_a_mistake_of_the_user(tmp_path, content, sentence):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError) as mistake:
        read_json_object(tmp_path / "file")
    assert sentence in str(mistake.value)
    assert str(mistake.value).endswith("write it as one JSON object.")
