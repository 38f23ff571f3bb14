# SPDX-License-Identifier: Apache-2.0
"""The files of a folder that hold rows, and those that nobody reads."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from llm_trainer.common.errors import UserError
from llm_trainer.readers.discovery import find_files, find_ignored_files
from support.data_files import read_damaged, read_rows, write_file


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
    quiet += ["cache-1234.arrow", "x.lock", "dataset_info.json", "g/state.json", "g/left-over.arrow"]
    told = ["a/c.txt", "data.JSONL", "train.parquet.gz", "z.zip"]
    for name in data + quiet + told:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"_data_files": [{"filename": "h.arrow"}]}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a/c.txt")
    (tmp_path / "nowhere.jsonl").symlink_to(tmp_path / "gone")
    found = [file.relative_to(tmp_path).as_posix() for file in find_files(tmp_path)]
    assert found == sorted([*data, "link.jsonl", "nowhere.jsonl"], key=Path)
    assert find_ignored_files(tmp_path) == sorted(told, key=Path)
    assert find_files(tmp_path / "a/c.txt") == [tmp_path / "a/c.txt"]
    assert find_ignored_files(tmp_path / "a/c.txt") == []
    for name in ("nowhere.jsonl", "nowhere.parquet", "nowhere.arrow", "nowhere.csv.gz"):
        assert read_damaged(tmp_path / name)[1] == (
            f"{name} cannot be read before its first row (No such file or directory): "
            "check that it is there and readable."
        )


def test_saved_datasets_are_read_in_order_through_the_files_that_they_name(tmp_path):
    rows = [{"text": str(number)} for number in range(50)]
    Dataset.from_list(rows).save_to_disk(tmp_path, num_shards=12)
    write_file(tmp_path, "left-over.arrow", b"")
    write_file(tmp_path, "cache-1234.arrow", b"")
    files = find_files(tmp_path)
    assert len(files) == 12
    assert [row for file in files for row in read_rows(file)[1]] == rows
    assert find_ignored_files(tmp_path) == []
    files[3].unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00003-of-00012\.arrow, which is not there"):
        find_files(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is not what save_to_disk writes"):
        find_files(tmp_path)


def test_of_a_saved_dataset_dict_only_one_split_is_read(tmp_path):
    DatasetDict({name: Dataset.from_list([{"text": name}]) for name in ("test", "train")}).save_to_disk(tmp_path)
    assert [read_rows(file)[1] for file in find_files(tmp_path, ("training", "train", "test"))] == [[{"text": "train"}]]
    assert [read_rows(file)[1] for file in find_files(tmp_path / "test")] == [[{"text": "test"}]]
    with pytest.raises(
        UserError, match=r"holds the splits test, train and none that was looked for \(validation, val\)"
    ):
        find_files(tmp_path, ("validation", "val"))
