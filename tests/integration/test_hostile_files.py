# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in the files that a job reads, `validate` ends in sentences that name the file."""

import json
import os
from unittest.mock import patch

import pytest

from llm_trainer.cli.validate import examine_job
from support.hostile_files import HOSTILE, is_object

CONFIG_FILES = ("hyperparameters", "inputdataconfig", "resourceconfig", "checkpointconfig")
NAMED = {  # file -> contents that are no fault in it
    **{f"input/config/{name}.json": [] for name in CONFIG_FILES},
    "input/data/config/job.yaml": ["null", "empty"],
    **{
        f"input/data/model/{name}": []
        for name in (
            *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
            *("special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json", "model.safetensors"),
        )
    },
}


@pytest.mark.parametrize("path", NAMED)
def test_a_hostile_file_is_named(make_tree, path):
    tree = make_tree()
    (tree.base_dir / "input/data/train/train.jsonl").unlink()  # without data nothing is imported or tokenized
    contents = {name: content for name, content in HOSTILE.items() if name not in NAMED[path]}
    for name, content in contents.items():
        if is_object(content):
            continue
        file = tree.write(path, len(content).to_bytes(8, "little") + content if path.endswith("tensors") else content)
        with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tree.base_dir)}):
            problems = examine_job([], in_colour=False).list_texts("error")
        assert any(file.name in problem for problem in problems), (name, problems)
        assert not any(problem.startswith("The check failed") for problem in problems), (name, problems)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("input/data/model/config.json", "config.json is a link to /nowhere, which is not there: copy the files"),
        ("input/data/model/model.safetensors", "model.safetensors is a link to /nowhere, which is not there: copy"),
        ("input/data/model/tokenizer.json", "tokenizer.json is a link to /nowhere, which is not there: copy the files"),
        ("input/data/train/train.jsonl", "train.jsonl is a link to '/nowhere', which is not there"),
        ("input/data/validation/validation.json", "validation.json is a link to '/nowhere', which is not there"),
    ],
)
def test_a_link_to_nowhere_is_named(make_tree, path, sentence):
    tree = make_tree()
    (tree.base_dir / path).unlink()
    (tree.base_dir / path).symlink_to("/nowhere")
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tree.base_dir)}):
        problems = examine_job([], in_colour=False).list_texts("error")
    assert any(sentence in problem for problem in problems), problems
    assert not any(problem.startswith("The check failed") for problem in problems), problems


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("config.json", {"hidden_size": "abc"}, "could not be loaded"),
        ("config.json", {"vocab_size": -1}, "has vocab_size=-1, and a model has at least 1"),
        ("config.json", {"model_type": [1]}, "could not be loaded"),
        ("tokenizer.json", {"added_tokens": None}, "could not be loaded"),
        ("tokenizer.json", {"model": 1}, "could not be loaded"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "could not be loaded"),
    ],
    ids=str,
)
def test_an_object_with_other_values_is_told_of(make_tree, name, change, sentence):
    tree = make_tree()
    file = tree.base_dir / "input/data/model" / name
    tree.write(f"input/data/model/{name}", json.loads(file.read_text()) | change)
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tree.base_dir)}):
        problems = examine_job([], in_colour=False).list_texts("error")
    assert any(sentence in problem for problem in problems), problems
    assert not any(problem.startswith("The check failed") for problem in problems), problems
