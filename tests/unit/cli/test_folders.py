# SPDX-License-Identifier: Apache-2.0
"""Folders on the command line reach every process of a job, and leave the settings alone."""

import os

import pytest

from llm_trainer.cli import folders
from llm_trainer.cli.folders import take_folders
from llm_trainer.common.errors import UserError


@pytest.fixture
def without_tree(tmp_path, monkeypatch):
    for name in ("SAGEMAKER_BASE_DIR", "LLM_TRAINER_DATA_DIR"):
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(folders, "DEFAULT_BASE_DIR", str(tmp_path / "opt/ml"))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["--data-dir", "d", "--output-dir", "o"],
        ["--data_dir=d", "--output_dir=o"],
        ["--output-dir=o", "--data-dir", "d"],
    ],
)
def test_without_opt_ml_the_folders_stand_for_it(without_tree, monkeypatch, words):
    monkeypatch.chdir(without_tree)
    (without_tree / "d").mkdir()
    assert take_folders(["--lora_r", "8", *words, "--checkpoint-dir", "c"]) == [
        "--lora_r",
        "8",
        "--checkpoint-dir",
        "c",
    ]
    assert os.environ["LLM_TRAINER_DATA_DIR"] == str(without_tree / "d")
    assert os.environ["SAGEMAKER_BASE_DIR"] == str(without_tree / "o")


def test_with_opt_ml_output_dir_is_the_setting(without_tree):
    (without_tree / "opt/ml/input/data").mkdir(parents=True)
    assert take_folders(["--output-dir", "/x"]) == ["--output-dir", "/x"]
    assert "SAGEMAKER_BASE_DIR" not in os.environ


def test_the_file_of_hyperpods_agent_is_no_tree_of_sagemaker(without_tree):
    (without_tree / "opt/ml/input/config").mkdir(parents=True)
    (without_tree / "opt/ml/input/config/pod_resourceconfig.json").touch()
    assert take_folders(["--output-dir", "/x"]) == []


@pytest.mark.usefixtures("without_tree")
def test_an_option_without_a_folder_is_left_to_the_settings():
    assert take_folders(["--data-dir", "--lora_r", "8"]) == ["--data-dir", "--lora_r", "8"]
    assert "LLM_TRAINER_DATA_DIR" not in os.environ


@pytest.mark.usefixtures("without_tree")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data-dir", "s3://bucket/data"], "--data-dir=s3://bucket/data is an address"),
        (["--output-dir=s3://bucket/out"], "--output-dir=s3://bucket/out is an address"),
        (["--data-dir=/nobody/has/this"], "--data-dir=/nobody/has/this is no folder on this machine: mount"),
    ],
)
def test_what_is_no_folder_is_a_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        take_folders(words)
