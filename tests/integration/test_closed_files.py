# SPDX-License-Identifier: Apache-2.0
"""A job whose user may not read an input, or not write to a folder: one sentence with path, user and fix, no traceback.

The user is root without the right to pass over the modes of files, or whoever runs the tests.
"""

import os
import subprocess
from unittest.mock import patch

import pytest

from llm_trainer.cli.validate import examine_job
from llm_trainer.common.errors import UserError
from llm_trainer.job.job import read_job
from support.ordinary_user import COMMAND, call_as_user
from support.sagemaker_tree import LLM_TRAINER

USER = f"user {os.getuid()}"
MODEL, TRAIN = "input/data/model", "input/data/train"
READ = [  # what is closed; a file that is not there is made
    "input",
    "input/config",
    *(f"input/config/{name}.json" for name in ("hyperparameters", "inputdataconfig", "resourceconfig")),
    "input/config/checkpointconfig.json",
    "input/data",
    "input/data/config",
    "input/data/config/job.yaml",
    MODEL,
    *(f"{MODEL}/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")),
    *(f"{MODEL}/{name}" for name in ("model.safetensors.index.json", "chat_template.jinja", "adapter_config.json")),
    TRAIN,
    *(f"{TRAIN}/{name}" for name in ("rows.jsonl", "below/rows.jsonl", "dataset_dict.json")),
    "input/data/validation",
    "checkpoints/checkpoint-3/trainer_state.json",
]
NAMED = {  # setting -> file; the folder that the file is in is closed
    "model_id": "closed/model/config.json",
    "config": "closed/job.yaml",
    "chat_template_path": "closed/template.jinja",
    "train_dataset_path": "closed/rows.jsonl",
    "val_dataset_path": "closed/rows.jsonl",
    "resume_from_checkpoint": "closed/checkpoint-3/trainer_state.json",
}


@pytest.fixture
def closed(make_tree):
    """A tree of a job, and a function that closes a path below it, made if it is not there."""
    tree = make_tree()
    folders = []

    def close(path, mode=0):
        place = tree.base_dir / path
        if not place.exists():
            tree.write(path, "") if place.suffix else place.mkdir(parents=True)
        folders.append((place, place.stat().st_mode))
        place.chmod(mode)

    yield tree, close
    for place, mode in folders:
        place.chmod(mode)


def find_problems(tree):
    """What `train` and `validate` find wrong, the former first."""
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tree.base_dir)}):
        with pytest.raises(UserError) as refusal:
            call_as_user(lambda: read_job([]))
        yield refusal.value.problems
        yield call_as_user(lambda: examine_job([], in_colour=False)).list_texts("error")


def remove_rows(tree):
    """Without data `validate` imports and tokenizes nothing."""
    (tree.base_dir / TRAIN / "train.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize("path", READ)
def test_an_input_that_the_user_cannot_read(closed, path):
    tree, close = closed
    if not path.startswith(TRAIN):
        remove_rows(tree)
    close(path)
    for problems in find_problems(tree):
        (problem,) = (text for text in problems if USER in text)
        assert str(tree.base_dir / path) in problem
        assert f"cannot be read by {USER}" in problem
        assert problem.endswith("or run as another user.")
        assert len([text for text in problems if "has no .json" not in text]) == 1, problems


@pytest.mark.parametrize("setting", NAMED)
def test_a_setting_that_leads_into_a_closed_folder(closed, setting):
    tree, close = closed
    remove_rows(tree)
    file = tree.write(NAMED[setting], "")
    place = file.parent if setting in ("model_id", "resume_from_checkpoint") else file
    tree.change(**{setting: str(place)})
    close("closed")
    for problems in find_problems(tree):
        (problem,) = (text for text in problems if USER in text)
        assert problem.startswith(f"{place} cannot be read by {USER}, who may not enter {tree.base_dir / 'closed'}: ")


def test_links_into_a_closed_folder(closed):
    tree, close = closed
    for name in ("model", "validation"):
        (tree.base_dir / "elsewhere").mkdir(exist_ok=True)
        (tree.base_dir / "input/data" / name).rename(tree.base_dir / "elsewhere" / name)
        (tree.base_dir / "input/data" / name).symlink_to(tree.base_dir / "elsewhere" / name)
    close("elsewhere")
    for problems in find_problems(tree):
        assert sorted(problems) == [
            f"{tree.base_dir / 'input/data' / name} cannot be read by {USER}, who may not enter "
            f"{tree.base_dir / 'elsewhere'}: make it readable (`chmod -R a+rX {tree.base_dir / 'elsewhere'}`), or run "
            "as another user."
            for name in ("model", "validation")
        ]


@pytest.mark.parametrize("mode", [0, 0o500], ids=["closed", "read-only"])
@pytest.mark.parametrize("name", ["model", "checkpoints", "output"])
def test_a_folder_that_the_user_cannot_write_to(closed, name, mode):
    tree, close = closed
    remove_rows(tree)
    close(name, mode)
    for problems in find_problems(tree):
        (problem,) = (text for text in problems if USER in text)
        assert f"{USER} cannot write to {tree.base_dir / name}: mount it writable, or run as another user." in problem


@pytest.mark.parametrize(
    ("command", "path"),
    [
        *(("train", path) for path in (MODEL, f"{MODEL}/model.safetensors", "input/config/hyperparameters.json")),
        ("validate", MODEL),
        ("validate", "cache"),
    ],
)
def test_no_traceback_reaches_the_log(closed, command, path):
    tree, close = closed
    if command == "validate":
        remove_rows(tree)
    close(path)
    cache = {"SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tree.base_dir / "cache")}
    result = subprocess.run(
        [*COMMAND, str(LLM_TRAINER), command],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir), **(cache if path == "cache" else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "Traceback" not in output
    assert USER in output
    if command == "train":
        assert USER in tree.failure.splitlines()[0]
        assert not tree.model_files
