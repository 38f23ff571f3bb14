# SPDX-License-Identifier: Apache-2.0
"""What a job points at is checked before anything heavy starts."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.load import read_settings
from llm_trainer.job.inputs import find_inputs, find_missing_weights, find_warnings
from llm_trainer.job.job import read_job
from support.small_disk import small_disk

FOLDERS = {"output_dir": "model", "checkpoint_dir": "checkpoints", "output": "output"}
GIT_LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def inputs_of(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))

    def read():
        environment = read_environment()
        return find_inputs(read_settings(environment, {})[0], environment)

    return read


def names(sources):
    return [file.name for source in sources for file in source.files]


def test_channels_are_found_without_settings(tree, inputs_of):
    inputs, problems = inputs_of()
    assert not problems
    assert inputs.model == str(tree.base_dir / "input/data/model")
    assert names(inputs.train) == ["train.jsonl"]
    assert names(inputs.validation) == ["validation.json"]
    assert inputs.model_dir == tree.base_dir / "model"


def test_settings_come_before_channels(tree, inputs_of):
    file = tree.write("elsewhere/rows.jsonl", "")
    tree.change(train_dataset_path=str(file), output_dir=str(tree.base_dir / "model/out"), model_id="org/name")
    inputs, problems = inputs_of()
    assert not problems
    assert inputs.train[0].files == (file,)
    assert inputs.model_dir == tree.base_dir / "model/out"
    assert inputs.model == "org/name"


@pytest.mark.parametrize(
    ("source", "place", "setting", "words"),
    [
        ("input/data/model", "model", "model_id", "model' is the folder of the model"),
        ("input/data/model", "model/base", "model_id", "model' holds the folder of the model"),
        ("input/data/train/train.jsonl", "model/rows.jsonl", "train_dataset_path", "model' holds train_dataset_path"),
        (None, "checkpoints/out", "output_dir", "out' lies in the folder of the checkpoints"),
    ],
)
def test_a_result_in_a_folder_that_the_job_reads_is_refused(tree, inputs_of, source, place, setting, words):
    if source:
        shutil.rmtree(tree.base_dir / "model", ignore_errors=True)
        (tree.base_dir / place).parent.mkdir(parents=True, exist_ok=True)
        (tree.base_dir / source).rename(tree.base_dir / place)
    tree.change(**{setting: str(tree.base_dir / place)})
    _, (problem,) = inputs_of()
    assert f"{words} (" in problem
    assert problem.endswith("give the result a folder of its own.")


def test_files_of_others_in_the_way_of_the_result_are_refused_and_those_of_a_job_are_not(tree, inputs_of):
    tree.write("model/adapter_config.json/mine", "")
    tree.write("model/notes.txt", "")
    _, (problem,) = inputs_of()
    assert "model' holds adapter_config.json, which the result would replace" in problem
    (tree.base_dir / "model/adapter_config.json/mine").unlink()
    (tree.base_dir / "model/adapter_config.json").rmdir()
    tree.write("model/adapter_config.json", "{}")
    tree.write("model/training_manifest.json", {"files": ["adapter_config.json", "training_manifest.json"]})
    assert inputs_of()[1] == []


@pytest.mark.parametrize("name", ["model_id", "train_dataset_path", "val_dataset_path", "output_dir", "checkpoint_dir"])
def test_an_address_in_the_place_of_a_path_is_refused_once(tree, inputs_of, name):
    tree.change(**{name: "s3://bucket/prefix"})
    (problem,) = inputs_of()[1]
    assert problem.startswith(f"{name}='s3://bucket/prefix' is an address")


@pytest.mark.parametrize("channel", ["val", "validation"])
def test_the_validation_channel_has_two_names(tree, inputs_of, channel):
    (tree.base_dir / "input/data/validation").rename(tree.base_dir / "input/data" / channel)
    tree.write("input/config/inputdataconfig.json", {})
    assert names(inputs_of()[0].validation) == ["validation.json"]


def test_everything_missing_is_told_at_once(tree, inputs_of):
    for folder in ("model", "train", "validation"):
        (tree.base_dir / "input/data" / folder).rename(tree.base_dir / f"no-{folder}")
    tree.write("input/config/inputdataconfig.json", {})
    tree.change(early_stopping="true")
    _, problems = inputs_of()
    assert [problem.split(" ")[0] for problem in problems] == ["model_id", "Training", "early_stopping=true"]


def test_a_channel_without_data_files_is_told_with_what_is_there(tree, inputs_of):
    (tree.base_dir / "input/data/train/train.jsonl").rename(tree.base_dir / "input/data/train/train.xlsx")
    _, (problem,) = inputs_of()
    assert "Channel 'train' has no .json, .jsonl, .csv, .tsv, .parquet, .arrow, .feather or .tar file" in problem
    assert "found: train.xlsx" in problem


def test_a_listed_channel_without_a_folder_is_told(tree, inputs_of):
    (tree.base_dir / "input/data/train").rename(tree.base_dir / "train")
    _, (problem,) = inputs_of()
    assert "Channel 'train' does not exist" in problem


@pytest.mark.parametrize(
    ("removed", "word"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer")],
)
def test_an_incomplete_model_folder_is_told(tree, inputs_of, removed, word):
    (tree.base_dir / "input/data/model" / removed).unlink()
    _, (problem,) = inputs_of()
    assert word in problem


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("config.json", "{", "config.json is not valid JSON (Expecting property name"),
        ("config.json", "{}", "config.json has no model_type"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", GIT_LFS_POINTER, "config.json is a Git LFS pointer"),
        ("tokenizer.json", GIT_LFS_POINTER, "tokenizer.json is a Git LFS pointer"),
        ("model.safetensors", GIT_LFS_POINTER, "model.safetensors is a Git LFS pointer and not the weights: run"),
    ],
)
def test_a_damaged_model_file_is_told(tree, inputs_of, file, content, word):
    tree.write(f"input/data/model/{file}", content)
    _, (problem,) = inputs_of()
    assert word in problem


def test_an_adapter_beside_the_base_is_refused(tree, inputs_of):
    tree.write("input/data/model/adapter_config.json", {"base_model_name_or_path": "org/base"})
    _, (problem,) = inputs_of()
    assert problem == (
        f"Model folder {tree.base_dir / 'input/data/model'} also holds an adapter (adapter_config.json), which would "
        "be loaded with the base unasked: remove its files there, and give them as channel 'adapter' to go on from it."
    )


def test_an_adapter_alone_is_no_model(tree, inputs_of):
    tree.write("input/data/model/adapter_config.json", {"base_model_name_or_path": "org/base"})
    (tree.base_dir / "input/data/model/config.json").unlink()
    _, (problem,) = inputs_of()
    assert "holds an adapter of 'org/base' and no model" in problem
    tree.write("input/data/model/adapter_config.json", "no JSON")
    _, (problem,) = inputs_of()
    assert "holds an adapter and no model" in problem


def test_weights_under_another_name_are_not_taken_for_the_models(tree, inputs_of):
    folder = tree.base_dir / "input/data/model"
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (lack,) = find_missing_weights(str(folder))
    assert "found consolidated.safetensors, which is not read" in lack


def test_a_config_that_names_other_weights_is_refused(tree, inputs_of):
    config = json.loads((tree.base_dir / "input/data/model/config.json").read_text())
    tree.write("input/data/model/config.json", {**config, "transformers_weights": "other.safetensors"})
    _, (problem,) = inputs_of()
    assert "has transformers_weights='other.safetensors'" in problem


def test_only_a_job_needs_weights(tree, inputs_of):
    folder = tree.base_dir / "input/data/model"
    (folder / "model.safetensors").unlink()
    _, problems = inputs_of()
    assert not problems
    with pytest.raises(UserError, match=f"Model folder {folder} has no weights: put"):
        read_job([])


def test_pickled_weights_are_named_and_not_read(tree, inputs_of):
    folder = tree.base_dir / "input/data/model"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (lack,) = find_missing_weights(str(folder))
    assert "found pytorch_model.bin, which is not read" in lack


def test_what_is_seldom_meant_is_told(tree, inputs_of):
    tree.write("input/data/train/notes.docx", "")
    tree.write("input/data/vaildation/rows.jsonl", "")
    tree.change(token="hunter2", ignore_data_skip="true")
    environment = read_environment()
    settings, _ = read_settings(environment, {})
    oddities = list(find_warnings(settings, environment, inputs_of()[0]))
    assert [oddity.split(":")[0] for oddity in oddities] == [
        "train holds files that are not read",
        "nothing reads channel vaildation",
        "everyone who may describe the job can read token",
        "ignore_data_skip=true",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("early_stopping", "true"),
        ("load_best_model_at_end", "true"),
        ("eval_on_start", "true"),
        ("eval_strategy", "steps"),
        ("save_strategy", "best"),
        ("lr_scheduler_type", "reduce_lr_on_plateau"),
        ("_tuning_objective_metric", "eval_loss"),
    ],
)
def test_what_needs_evaluations_needs_validation_data(tree, inputs_of, name, value):
    tree.change(**{name: value})
    assert inputs_of()[1] == []
    shutil.rmtree(tree.base_dir / "input/data/validation")
    tree.write("input/config/inputdataconfig.json", {})
    (problem,) = inputs_of()[1]
    assert problem.startswith(f"{name}=")
    assert "needs validation data" in problem


def test_a_path_that_is_no_folder_is_no_model(tree, inputs_of):
    tree.change(model_id="/opt/ml/input/data/modle")
    _, (problem,) = inputs_of()
    assert "neither a folder in the container nor a Hugging Face id" in problem


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere; the image tests run this as another user")
def test_an_unwritable_result_folder_is_told(tree, inputs_of):
    (tree.base_dir / "model").mkdir(mode=0o500)
    _, (problem,) = inputs_of()
    assert "cannot write to" in problem


def test_a_read_only_folder_is_told_before_the_job_starts(tree, inputs_of):
    with contextlib.ExitStack() as stack:
        disks = [
            stack.enter_context(small_disk(tree.base_dir / name, 64)) for name in ("model", "checkpoints", "output")
        ]
        for disk in disks:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        problems = inputs_of()[1]
        tree.change(use_checkpoints="false")
        assert len(inputs_of()[1]) == 2
    assert sorted(problems) == sorted(
        f"{name}: {tree.base_dir / folder} is on a read-only file system: mount it writable."
        for name, folder in FOLDERS.items()
    )


def test_the_launchers_modules_import_neither_torch_nor_trackers(tree):
    code = (
        "import sys, llm_trainer.launcher.launch, llm_trainer.job.job as job; job.read_job([]); "
        "print(sorted({'torch', 'transformers', 'trl', 'mlflow', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"


def test_a_reward_model_goes_on_from_no_adapter(tree, inputs_of):
    tree.write("input/data/adapter/adapter_config.json", {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8})
    tree.write_job({"method": "reward"}, ("model", "adapter", "train"))
    (problem,) = [text for text in inputs_of()[1] if "method=reward" in text]
    assert problem.startswith("channel 'adapter' with method=reward: a reward model begins with a base; set ")


def test_a_distillation_has_a_teacher(tree, inputs_of):
    tree.change(method="distill")
    _, (problem,) = inputs_of()
    assert problem == (
        "teacher_model_name_or_path is missing with method=distill: give the teacher's Hugging Face id, or its files "
        "as channel 'teacher'."
    )
    shutil.copytree(tree.base_dir / "input/data/model", tree.base_dir / "input/data/teacher")
    inputs, problems = inputs_of()
    assert not problems
    assert inputs.teacher == str(tree.base_dir / "input/data/teacher")
    tree.change(teacher_model_name_or_path="org/large")
    assert inputs_of()[0].teacher == "org/large"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://bucket/teacher", "is an address, and a model is read from a folder: give its S3 prefix as channel 'te"),
        ("not a name", "is neither a folder in the container nor a Hugging Face id"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_told_by_its_own_setting(tree, inputs_of, place, words):
    tree.change(method="distill", teacher_model_name_or_path=place)
    _, (problem,) = inputs_of()
    assert problem.startswith(f"teacher_model_name_or_path={place!r} {words}")


def test_a_teacher_needs_weights_too(tree, inputs_of):
    shutil.copytree(tree.base_dir / "input/data/model", tree.base_dir / "input/data/teacher")
    (tree.base_dir / "input/data/teacher/model.safetensors").unlink()
    tree.change(method="distill")
    with pytest.raises(UserError, match=f"Teacher's folder {tree.base_dir / 'input/data/teacher'} has no weights: put"):
        read_job([])


def test_no_other_method_has_a_teacher(tree, inputs_of):
    tree.write("input/data/teacher/config.json", {})
    _, (problem,) = inputs_of()
    assert problem.startswith("channel 'teacher' with method=sft: only method=distill has a teacher; remove")
