# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, and what is removed is gone without harm to what a link names."""

import hashlib
import os

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import (
    check_access,
    compute_digest,
    find_barrier,
    find_denial,
    hide_in_file,
    is_inner_path,
    read_json_object,
    remove_leftover,
    remove_path,
    rename_durably,
    replace_file,
    write_text,
)
from support.ordinary_user import call_as_user

USER = f"user {os.getuid()}"


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


def test_secrets_that_the_writer_did_not_know_are_hidden_afterwards(tmp_path, monkeypatch):
    file, other = tmp_path / "rank-0.txt", tmp_path / "rank-1.txt"
    file.write_bytes(b"first\n\xffsays hf_secretOfTheTest\n")
    other.write_text("nothing\n")
    before = other.stat().st_ino
    monkeypatch.setenv("HF_TOKEN", "hf_secretOfTheTest")
    hide_in_file(file)
    hide_in_file(other)
    assert file.read_bytes() == b"first\n\xffsays ***\n"
    assert other.stat().st_ino == before


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


@pytest.fixture
def tree(tmp_path):
    """A folder that is closed, with a file in it, and one that is open, with a link to that file."""
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "closed/file").touch()
    (tmp_path / "open/link").symlink_to(tmp_path / "closed/file")
    (tmp_path / "closed").chmod(0)
    yield tmp_path
    (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize("mode", [0, 0o100, 0o400], ids=["closed", "cannot be listed", "cannot be entered"])
def test_a_folder_is_read_where_it_can_be_listed_and_entered(tree, mode):
    (tree / "closed").chmod(mode)
    assert call_as_user(lambda: find_barrier(tree / "closed")) == tree / "closed"


def test_what_keeps_from_a_file_is_the_folder_on_its_way(tree):
    for file in ("closed/file", "open/link", "closed/not/there"):
        assert call_as_user(lambda file=file: find_barrier(tree / file)) == tree / "closed"


def test_what_is_not_there_is_not_denied(tree):
    (tree / "open/file").touch()
    (tree / "open/to-nowhere").symlink_to("/nowhere")
    for path in ("open/other", "open/other/below", "open/to-nowhere", "open/file/below", "open/" + "x" * 300, "\0"):
        assert call_as_user(lambda path=path: find_barrier(tree / path)) is None


def test_everything_below_is_told_in_one_sentence(tree):
    def ask(depth):
        return call_as_user(lambda: list(find_denial(tree, depth)))

    (tree / "open/hidden").touch(mode=0)
    (tree / "open/hidden").rename(tree / "open/.hidden")
    assert ask(0) == []
    assert ask(1) == [
        f"{tree}/closed cannot be read by {USER}: make it readable (`chmod -R a+rX {tree}/closed`), or run as "
        "another user."
    ]
    assert ask(2) == [
        f"{tree}/closed and 1 more at {tree} cannot be read by {USER}: make it readable "
        f"(`chmod -R a+rX {tree}`), or run as another user."
    ]


def test_a_mistake_names_what_is_in_the_way(tree):
    with pytest.raises(UserError, match=rf"link cannot be read by {USER}, who may not enter {tree}/closed: make it"):
        call_as_user(lambda: check_access(tree / "open/link"))
    call_as_user(lambda: check_access(tree / "open"))
