# SPDX-License-Identifier: Apache-2.0
"""What a job points at is checked before anything heavy starts."""

import json
import os
import subprocess
import sys

import pytest

from llm_trainer.environment import read_environment
from llm_trainer.preflight import find_inputs
from llm_trainer.settings import read_settings


@pytest.fixture
def inputs_of(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))

    def read():
        environment = read_environment()
        return find_inputs(read_settings(environment, {})[0], environment)

    return read


def test_channels_are_found_without_settings(tree, inputs_of):
    inputs, problems = inputs_of()
    assert not problems
    assert inputs.model == str(tree.base_dir / "input/data/model")
    assert [file.name for file in inputs.train_files] == ["train.jsonl"]
    assert [file.name for file in inputs.validation_files] == ["validation.json"]
    assert inputs.model_dir == tree.base_dir / "model"


def test_settings_come_before_channels(tree, inputs_of):
    file = tree.write("elsewhere/rows.data", "[]")
    tree.change(train_dataset_path=str(file), output_dir=str(tree.base_dir / "out"), model_id="org/name")
    inputs, problems = inputs_of()
    assert not problems
    assert inputs.train_files == [file]
    assert inputs.model_dir == tree.base_dir / "out"
    assert inputs.model == "org/name"


@pytest.mark.parametrize("channel", ["val", "validation"])
def test_the_validation_channel_has_two_names(tree, inputs_of, channel):
    (tree.base_dir / "input/data/validation").rename(tree.base_dir / "input/data" / channel)
    tree.write("input/config/inputdataconfig.json", {})
    assert len(inputs_of()[0].validation_files) == 1


def test_everything_missing_is_told_at_once(tree, inputs_of):
    for folder in ("model", "train", "validation"):
        (tree.base_dir / "input/data" / folder).rename(tree.base_dir / folder)
    tree.write("input/config/inputdataconfig.json", {})
    tree.change(early_stopping="true")
    _, problems = inputs_of()
    assert [problem.split(" ")[0] for problem in problems] == ["model_id", "Training", "early_stopping=true"]


def test_a_channel_without_data_files_is_told_with_what_is_there(tree, inputs_of):
    (tree.base_dir / "input/data/train/train.jsonl").rename(tree.base_dir / "input/data/train/train.csv")
    _, (problem,) = inputs_of()
    assert "Channel 'train' has no .json or .jsonl file" in problem
    assert "found: train.csv" in problem


def test_a_listed_channel_without_a_folder_is_told(tree, inputs_of):
    (tree.base_dir / "input/data/train").rename(tree.base_dir / "train")
    _, (problem,) = inputs_of()
    assert "Channel 'train' does not exist" in problem


@pytest.mark.parametrize(
    ("removed", "word"),
    [("model.safetensors", "has no weights"), ("config.json", "no config.json"), ("tokenizer.json", "no tokenizer")],
)
def test_an_incomplete_model_folder_is_told(tree, inputs_of, removed, word):
    (tree.base_dir / "input/data/model" / removed).unlink()
    _, (problem,) = inputs_of()
    assert word in problem


def test_pickled_weights_are_named_and_not_read(tree, inputs_of):
    folder = tree.base_dir / "input/data/model"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _, (problem,) = inputs_of()
    assert "found pytorch_model.bin, which is not read" in problem


def test_a_missing_shard_is_told(tree, inputs_of):
    folder = tree.base_dir / "input/data/model"
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / shards["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    _, (problem,) = inputs_of()
    assert "lacks 1 weight files of its index, first model-00002-of-00002.safetensors" in problem


def test_a_path_that_is_no_folder_is_no_model(tree, inputs_of):
    tree.change(model_id="/opt/ml/input/data/modle")
    _, (problem,) = inputs_of()
    assert "neither a folder in the container nor a Hugging Face id" in problem


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere; the image tests run this as another user")
def test_an_unwritable_result_folder_is_told(tree, inputs_of):
    (tree.base_dir / "model").mkdir(mode=0o500)
    _, (problem,) = inputs_of()
    assert "cannot write to" in problem


def test_the_launchers_modules_import_neither_torch_nor_trackers(tree):
    code = (
        "import sys, llm_trainer.launch as launch; launch.read_job([]); "
        "print(sorted({'torch', 'transformers', 'trl', 'mlflow', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"
