# SPDX-License-Identifier: Apache-2.0
"""Jobs that learn from a teacher: like others they are stopped, resumed, spread over ranks, merged and proven."""

import json
import os
from unittest.mock import patch

import pytest

from llm_trainer.cli.plan import examine_model
from llm_trainer.cli.validate import examine_job
from support.compared_jobs import check_metrics_are_alike, check_stop_changes_nothing
from support.sagemaker_tree import finish, metrics_of
from support.teachers import write_teacher

KEYS = ("train_loss", "entropy", "tokens", "grad_norm")
FULL = {"use_peft": "false", "learning_rate": "0.001"}
CHANNELS = ("model", "teacher", "train", "validation")


@pytest.fixture
def make_job(make_tree):
    def make(**hyperparameters):
        tree = make_tree()
        write_teacher(tree.base_dir / "input/data/model", tree.base_dir / "input/data/teacher")
        hyperparameters = {"method": "distill", "beta": "0", **hyperparameters}
        given = json.loads((tree.base_dir / "input/config/hyperparameters.json").read_text())
        tree.write_job({k: v for k, v in (given | hyperparameters).items() if v is not None}, CHANNELS)
        return tree

    return make


@pytest.mark.parametrize(
    "options", [{"merge_weights": "true"}, pytest.param(FULL, marks=pytest.mark.long)], ids=["lora and merged", "full"]
)
def test_a_job_learns_what_its_teacher_says(make_job, options):
    tree = make_job(num_train_epochs="6", **options)
    log = finish(tree)
    losses = metrics_of(log, "train_loss")
    assert losses[-1] < 0.95 * losses[0]
    assert metrics_of(log, "eval_loss")[-1] < metrics_of(log, "eval_loss")[0]
    assert metrics_of(log, "eval_entropy")
    assert "Packing: the rows of a batch share sequences" in log
    assert tree.manifest["export"]["proven"]
    assert tree.manifest["settings"]["method"] == "distill"
    assert tree.manifest["memory"]["estimate"]["parts"]["teacher"] > 0
    assert len(tree.manifest["teacher_digest"]) == 12


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
def test_a_stopped_run_ends_with_the_same_weights(make_job, start, options):
    shared = {"num_train_epochs": "3", "per_device_train_batch_size": "4", "save_steps": "1", **options}
    whole, stopped = make_job(**shared), make_job(**shared)
    check_stop_changes_nothing(whole, stopped, start)
    assert whole.manifest["num_steps"] == 24


@pytest.mark.long
def test_a_run_does_not_go_on_with_another_teacher(make_job):
    tree = make_job()
    finish(tree)
    for file in (tree.base_dir / "input/data/model").glob("*.safetensors"):
        tree.write(f"input/data/teacher/{file.name}", file.read_bytes())
    config = (tree.base_dir / "input/data/model/config.json").read_text()
    tree.write("input/data/teacher/config.json", config)
    tree.change(num_train_epochs="2")
    assert tree.run().returncode != 0
    assert "is a checkpoint of another run (teacher was " in tree.failure


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_ranks_are_one(make_job, distribution, options):
    shared = {"num_train_epochs": "2", "global_batch_size": "10", "per_device_train_batch_size": None, **options}
    one, two = make_job(**shared), make_job(**shared, nproc_per_node="2", distribution=distribution)
    logs = finish(one), finish(two)
    check_metrics_are_alike(logs[1], logs[0], (*KEYS, "eval_loss", "eval_entropy"), rel=1e-5, abs=1e-5)
    assert two.manifest["export"]["proven"]


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"packing": "true", "max_length": "128"}], ids=["batch", "data set"])
def test_packed_rows_learn_what_padded_ones_do(make_job, options):
    shared = {"train_sampling_strategy": "random"}
    packed, padded = make_job(**shared, **options), make_job(**shared, packing="false")
    logs = finish(packed), finish(padded)
    assert "Packing: the rows of a" in logs[0]
    if not options:
        check_metrics_are_alike(logs[0], logs[1], KEYS, rel=1e-4, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantized_teacher_teaches_nearly_the_same(make_job, bits):
    """And the student beside it may be quantized otherwise."""
    pytest.importorskip("bitsandbytes")
    whole, rounded = make_job(), make_job(**{f"teacher_load_in_{bits}bit": "true"})
    losses = [metrics_of(finish(tree), "train_loss") for tree in (whole, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def examine(tree, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    with patch.dict(os.environ):
        return examine_job((), in_colour=False)


def test_a_validation_tells_of_the_teacher(make_job, monkeypatch, tmp_path):
    tree = make_job()
    found = examine(tree, monkeypatch, tmp_path)
    assert found.list_texts("error") == []
    assert any(finding.subject == "teacher" and "student's vocabulary" in finding.text for finding in found.findings)
    parts = next(iter(found.memory.values()))["parts"]
    assert parts["teacher"] > 0
    assert parts["teacher's states"] > 0


def test_a_teacher_of_another_vocabulary_is_told_of_before_weights_load(make_job, monkeypatch, tmp_path):
    tree = make_job()
    file = tree.base_dir / "input/data/teacher/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words, key=words.get)[20:22]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(tokenizer))
    for weights in file.parent.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    (problem,) = examine(tree, monkeypatch, tmp_path).list_texts("error")
    assert problem.startswith("teacher_model_name_or_path='")
    assert f"has another vocabulary than the student ({first!r} is token 21 there and token 20 here)" in problem
    assert tree.run().returncode != 0
    assert tree.failure.startswith(problem)


def test_a_teacher_of_another_size_of_vocabulary_is_told_of(make_job, monkeypatch, tmp_path):
    tree = make_job()
    file = tree.base_dir / "input/data/teacher/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    (problem,) = examine(tree, monkeypatch, tmp_path).list_texts("error")
    sizes = f"tells {config['vocab_size'] + 64} tokens apart and the student {config['vocab_size']}"
    assert sizes in problem


def test_a_plan_counts_the_teacher_by_its_config_alone(make_job, monkeypatch, tmp_path):
    tree = make_job()
    teacher = tree.base_dir / "input/data/teacher"
    for file in teacher.iterdir():
        if file.name != "config.json":
            file.unlink()
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    with patch.dict(os.environ):
        planned = examine_model(())
    assert planned.list_texts("error") == []
    assert all(way["parts"]["teacher"] > 0 for way in planned.memory.values())
    assert planned.instances["cheapest"]
