# SPDX-License-Identifier: Apache-2.0
"""The files of a folder that hold rows, and those that nobody reads."""

import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from llm_trainer.common.errors import UserError
from llm_trainer.readers.discovery import describe_passed_over, find_files, list_unexpected
from support.data_files import read_rows, write_file


def test_data_files_are_found_by_path_and_the_others_are_told(tmp_path):
    data = [
        "a b.csv",
        "a/x.jsonl.gz",
        "b/state.json",
        "d\u00e9.json",
        "e.ndjson.zst",
        "f.parquet",
        "g/h.arrow",
        "i.arrow",
    ]
    quiet = [".hidden.json", ".h/y.json", "README.md", "LICENSE", "notes.md", "_SUCCESS", "dataset_infos.json"]
    quiet += [
        "1.png",
        "images/2.JPEG",
        "cache-1234.arrow",
        "x.lock",
        "dataset_info.json",
        "g/state.json",
        "g/left-over.arrow",
    ]
    told = ["a/c.txt", "data.JSONL", "train.parquet.gz", "z.zip"]
    for name in data + quiet + told:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"_data_files": [{"filename": "h.arrow"}]}')
    (tmp_path / "folder.json").mkdir()
    files, passed_over = find_files(tmp_path)
    assert files == [tmp_path / name for name in sorted(data, key=Path)]
    assert list_unexpected(passed_over, tmp_path) == sorted(told, key=Path)
    assert (
        describe_passed_over(passed_over) == "10 about the data, 2 hidden, 2 images of rows, 4 of no kind that is read"
    )
    assert find_files(tmp_path / "a/c.txt") == ([tmp_path / "a/c.txt"], {})
    assert find_files(tmp_path / "none") == ([], {})


def lay_out(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("data", "passed_over"),
    [
        (["train.jsonl"], {"template.json": "JumpStart's prompt template, which is not applied"}),
        (["template.json"], {}),
        (["part-0.json"], {"_temporary/0/part-1.json": "in a folder that begins with _", "_SUCCESS": "about the data"}),
        (["_rows.json", "_year=2024/a.json"], {"__MACOSX/._a.json": "hidden"}),
        (["a.json"], {".ipynb_checkpoints/a-checkpoint.json": "hidden", ".a.json.crc": "hidden"}),
        (["data/a.parquet"], {"dataset_infos.json": "about the data", ".cache/huggingface/a.json": "hidden"}),
        (["part-0.csv"], {"manifest.json": "a list of files", "part.manifest": "of no kind that is read"}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002-0123abcd.parquet"],
            {"data/test-00000-of-00001.parquet": "of another split"},
        ),
        (["test-00000-of-00001.parquet"], {}),
    ],
)
def test_what_other_programs_leave_beside_rows_is_no_data_and_told(tmp_path, data, passed_over):
    lay_out(tmp_path, [*data, *passed_over])
    files, found = find_files(tmp_path, ("train",))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == data
    assert {file.relative_to(tmp_path).as_posix(): reason for file, reason in found.items()} == passed_over


def test_links_are_followed_within_the_folder_and_each_file_is_read_once(tmp_path):
    lay_out(tmp_path, ["hub/blobs/0123", "v1/rows.json", ".k8s/kept/mounted.json"])
    (tmp_path / "hub/rows.jsonl").symlink_to("blobs/0123")
    (tmp_path / "again.json").symlink_to("v1/rows.json")
    (tmp_path / "current").symlink_to("v1")
    (tmp_path / "circle").symlink_to(".")
    (tmp_path / "mounted.json").symlink_to(".k8s/kept/mounted.json")
    (tmp_path / "shown").symlink_to(".k8s/kept")
    (tmp_path / "README.md").symlink_to("/nowhere")
    files, passed_over = find_files(tmp_path)
    real = sorted(file.resolve().relative_to(tmp_path.resolve()).as_posix() for file in files)
    assert real == [".k8s/kept/mounted.json", "hub/blobs/0123", "v1/rows.json"]
    assert passed_over[tmp_path / "again.json"] == "the same file under another name"
    assert [file for file in files if "circle" in file.parts] == []


@pytest.mark.parametrize("target", ["/proc/self/environ", "/dev/zero", "../outside.json", "gone"])
def test_links_that_lead_out_or_nowhere_are_refused(tmp_path, target):
    lay_out(tmp_path, ["outside.json", "folder/rows.json"])
    (tmp_path / "folder/link.json").symlink_to(target)
    with pytest.raises(UserError, match=r"folder/link\.json is "):
        find_files(tmp_path / "folder")
    if target == "../outside.json":  # named by itself, a link may lead anywhere
        assert find_files(tmp_path / "folder/link.json")[0] == [tmp_path / "folder/link.json"]


def test_a_link_to_a_folder_outside_is_refused(tmp_path):
    lay_out(tmp_path, ["outside/rows.json", "folder/rows.json"])
    (tmp_path / "folder/more").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"folder/more is a link to .*/outside, outside of its folder: put the data"):
        find_files(tmp_path / "folder")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.parquet")
    os.mkfifo(tmp_path / "unread.txt")
    with pytest.raises(UserError) as raised:
        find_files(tmp_path)
    assert len(raised.value.problems) == 2
    assert "a.jsonl is no regular file but a pipe: give a file that can be read again" in raised.value.problems[0]
    for path in (tmp_path / "a.jsonl", Path("/dev/zero")):
        with pytest.raises(UserError, match="is no regular file"):
            find_files(path)


def test_saved_datasets_are_read_in_order_through_the_files_that_they_name(tmp_path):
    rows = [{"text": str(number)} for number in range(50)]
    Dataset.from_list(rows).save_to_disk(tmp_path, num_shards=12)
    write_file(tmp_path, "left-over.arrow", b"")
    write_file(tmp_path, "cache-1234.arrow", b"")
    files, passed_over = find_files(tmp_path)
    assert len(files) == 12
    assert [row for file in files for row in read_rows(file)[1]] == rows
    assert list_unexpected(passed_over, tmp_path) == []
    files[3].unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00003-of-00012\.arrow, which is not there"):
        find_files(tmp_path)
    for content in ("{", "[" * 100_000, '{"_data_files": [{"filename": "../rows.arrow"}]}', '{"splits": 1}', "[1]"):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"state\.json .*: save the dataset again\."):
            find_files(tmp_path)


def test_of_a_saved_dataset_dict_only_one_split_is_read(tmp_path):
    DatasetDict({name: Dataset.from_list([{"text": name}]) for name in ("test", "train")}).save_to_disk(tmp_path)
    assert [read_rows(file)[1] for file in find_files(tmp_path, ("training", "train", "test"))[0]] == [
        [{"text": "train"}]
    ]
    assert [read_rows(file)[1] for file in find_files(tmp_path / "test")[0]] == [[{"text": "test"}]]
    with pytest.raises(
        UserError, match=r"holds the splits test, train and none that was looked for \(validation, val\)"
    ):
        find_files(tmp_path, ("validation", "val"))
