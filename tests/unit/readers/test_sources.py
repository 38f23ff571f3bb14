# SPDX-License-Identifier: Apache-2.0
"""Which files and data sets a job's channels and paths mean."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

from llm_trainer.config.environment import read_environment
from llm_trainer.config.load import read_settings
from llm_trainer.readers.files import MAX_BYTES
from llm_trainer.readers.sources import (
    FileSource,
    HubSource,
    find_train_sources,
    find_unread_files,
    find_unused_channels,
    find_validation_sources,
)
from support.fake_hub import FakeHub
from support.waiting import GUARD_SECONDS

ROW = '{"text": "a"}\n'


@pytest.fixture
def find(tree, monkeypatch):
    """(sources, problems) of the tree's training or validation data."""
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    tree.write("input/config/inputdataconfig.json", {})

    def find(finder=find_train_sources):
        environment = read_environment()
        return finder(read_settings(environment, {})[0].data, environment)

    return find


def names_of(sources):
    return {source.name: [name for name, _ in source.name_files()] for source in sources}


def test_a_channel_is_a_source_of_all_its_files(tree, find):
    tree.write("input/data/train/more/b.csv", "text\na\n")
    tree.write("input/data/train/notes.txt", "x")
    (source,), problems = find()
    assert not problems
    assert names_of([source]) == {"train": ["more/b.csv", "train.jsonl"]}
    assert find_unread_files(source) == ["notes.txt"]
    assert [file["name"] for file in source.identify_files()] == ["more/b.csv", "train.jsonl"]


def test_all_channels_named_train_are_read_and_their_files_told_apart(tree, find):
    tree.write("input/data/train_b/x.jsonl", ROW)
    tree.write("input/data/trains/x.jsonl", ROW)
    sources, problems = find()
    assert not problems
    assert names_of(sources) == {"train": ["train/train.jsonl"], "train_b": ["train_b/x.jsonl"]}
    assert find_unused_channels(read_environment()) == ["trains"]


def test_weights_name_each_training_channel(tree, find):
    tree.write("input/data/train_b/x.jsonl", ROW)
    tree.change(train_weights=json.dumps({"train": 1, "train_c": 1}))
    _, (problem,) = find()
    assert "must name each training channel once, and there are train, train_b" in problem


@pytest.mark.parametrize("channel", ["val", "validation", "validation_news"])
def test_the_validation_channel_has_several_names(tree, find, channel):
    (tree.base_dir / "input/data/validation").rename(tree.base_dir / "input/data" / channel)
    (source,), _ = find(find_validation_sources)
    assert source.name == channel


def test_validation_data_may_be_missing(tree, find):
    (tree.base_dir / "input/data/validation").rename(tree.base_dir / "v")
    assert find(find_validation_sources) == ([], [])


def test_a_path_comes_before_channels_and_may_be_any_file(tree, find):
    file = tree.write("elsewhere/rows.data", ROW)
    tree.change(train_dataset_path=str(file))
    assert find() == ([FileSource(str(file), file.parent, (file,))], [])


def test_a_missing_path_and_an_empty_channel_are_told(tree, find):
    (tree.base_dir / "input/data/train/train.jsonl").rename(tree.base_dir / "input/data/train/train.txt")
    _, (problem,) = find()
    assert "Channel 'train' has no .json, .jsonl, .csv, .tsv, .parquet, .arrow, .feather or .tar file" in problem
    assert "found: train.txt" in problem
    tree.change(train_dataset_path="/no/such/place")
    _, (problem,) = find()
    assert problem.startswith("train_dataset_path='/no/such/place' does not exist in the container")


def test_of_saved_splits_each_channel_takes_its_own(tree, find):
    rows = Dataset.from_list([{"text": "a"}])
    for channel in ("train", "validation"):
        DatasetDict(train=rows, test=rows).save_to_disk(tree.base_dir / "input/data" / channel)
    (train,), _ = find()
    (validation,), _ = find(find_validation_sources)
    assert [file.parent.name for file in (*train.files, *validation.files)] == ["train", "test"]


READ_HUB = """
import json
from llm_trainer.common.errors import UserError
from llm_trainer.readers.sources import HubSource
for source in (HubSource("tiny/data", None, "train"), HubSource("tiny/data", None, "test"),
               HubSource("tiny/none", None, "train"), HubSource("tiny/data", None, "dev"),
               HubSource("tiny/data", "cfg", "train")):
    try:
        chunks = [(chunk.file, chunk.numbers, chunk.rows) for part in source.read_parts(2) for chunk in part]
        print("result", json.dumps([chunks, source.identify_files()]))
    except UserError as error:
        print("result", json.dumps(str(error)))
"""


def test_a_hub_data_set_is_read_split_by_split_and_what_the_hub_lacks_is_told(tree, find, tmp_path):
    for name, rows in (("train.jsonl", 3), ("test.jsonl", 1)):
        tree.write(f"hub/{name}", ROW * rows)
    hub = FakeHub(tree.base_dir / "hub", "tiny/data", "datasets")
    result = subprocess.run(
        [sys.executable, "-c", READ_HUB],  # datasets reads its environment when it is imported
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=GUARD_SECONDS,
        check=True,
    )
    hub.close()
    lines = [line.removeprefix("result ") for line in result.stdout.splitlines() if line.startswith("result ")]
    train, test, no_data, no_split, no_config = map(json.loads, lines)
    assert train[0] == [["tiny/data train", [1, 2], [{"text": "a"}] * 2], ["tiny/data train", [3], [{"text": "a"}]]]
    assert [len(rows) for _, _, rows in test[0]] == [1]
    assert train[1] != test[1]
    assert "'tiny/none' is neither a file or folder in the container, nor can it be read from the Hugging" in no_data
    assert 'Unknown split "dev"' in no_split
    assert "BuilderConfig 'cfg' not found" in no_config


def test_an_id_is_a_hub_data_set_unless_it_is_a_path(tree, find):
    tree.change(train_dataset_path="tiny/data", val_dataset_path="tiny/data", dataset_config="cfg")
    assert find() == ([HubSource("tiny/data", "cfg", "train")], [])
    assert find(find_validation_sources) == ([HubSource("tiny/data", "cfg", "test")], [])


def test_rows_of_the_hub_come_a_few_bytes_at_a_time(monkeypatch):
    rows = Dataset.from_dict({"number": list(range(20)), "image": [bytes([255]) * 2**20] * 20})
    monkeypatch.setattr("llm_trainer.readers.sources.load_hub_data", lambda *_: rows)
    chunks = list(HubSource("tiny/data", None, "train").read_chunks(500))
    assert max(sum(len(row["image"]) for row in chunk.rows) for chunk in chunks) <= MAX_BYTES
    assert [number for chunk in chunks for number in chunk.numbers] == list(range(1, 21))
    assert [row["number"] for chunk in chunks for row in chunk.rows] == list(range(20))
