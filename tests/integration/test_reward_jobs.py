# SPDX-License-Identifier: Apache-2.0
"""Jobs that train a reward model: like others they are stopped, resumed, spread over ranks, merged and proven."""

import json
import os
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llm_trainer.cli.merge import MergeOptions, merge_adapter
from llm_trainer.cli.validate import examine_job
from support.compared_jobs import check_metrics_are_alike, check_stop_changes_nothing
from support.sagemaker_tree import finish, metrics_of

PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f"{a + b} it is", "rejected": f"{a + b + 1} " * (1 + b), "margin": b}
    for a in range(8)
    for b in range(3)
]
KEYS = ("train_loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "tokens", "grad_norm")
FULL = {"use_peft": "false", "learning_rate": "0.001"}


@pytest.fixture
def make_job(make_tree):
    def make(**hyperparameters):
        tree = make_tree()
        tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in PAIRS))
        tree.write("input/data/validation/validation.json", PAIRS[:5])
        tree.change(method="reward", **hyperparameters)
        return tree

    return make


def compute_reward(model, folder):
    """Return the reward that a user of the result gets for the first row's chosen answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = PAIRS[0]["prompt"] + PAIRS[0]["chosen"] + tokenizer.eos_token
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits.item()


@pytest.mark.parametrize(
    "options",
    [{"merge_weights": "true", "learning_rate": "0.01"}, pytest.param(FULL, marks=pytest.mark.long)],
    ids=["lora and merged", "full"],
)
def test_a_job_learns_to_reward_the_chosen_answers(make_job, options):
    tree = make_job(num_train_epochs="4", per_device_train_batch_size="6", **options)
    base_config = json.loads((tree.base_dir / "input/data/model/config.json").read_text())
    base_config["pad_token_id"] = base_config["eos_token_id"]  # by which Transformers would miss the last token
    tree.write("input/data/model/config.json", base_config)
    log = finish(tree)
    assert metrics_of(log, "accuracy")[-1] > 0.9
    assert metrics_of(log, "eval_accuracy")[-1] > 0.9
    assert metrics_of(log, "eval_margin")[-1] > 0
    assert tree.manifest["export"]["proven"]
    folder = tree.base_dir / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["problem_type"], list(config["id2label"])) == ("regression", ["0"])
    assert config["pad_token_id"] not in (None, config["eos_token_id"])
    assert not (folder / "generation_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_labels == 1
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    reward = compute_reward(model, folder)
    if "merge_weights" in options:
        base = AutoModelForSequenceClassification.from_pretrained(tree.base_dir / "input/data/model", num_labels=1)
        base.config.pad_token_id = model.config.pad_token_id
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        assert compute_reward(adapted, folder) == pytest.approx(reward, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
def test_a_stopped_run_ends_with_the_same_weights(make_job, start, options):
    shared = {"num_train_epochs": "3", "per_device_train_batch_size": "4", "save_steps": "1", **options}
    whole, stopped = make_job(**shared), make_job(**shared)
    check_stop_changes_nothing(whole, stopped, start)
    assert whole.manifest["num_steps"] == 18


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("distribution", ["ddp", "fsdp"])
def test_two_ranks_are_one(make_job, distribution, options):
    shared = {"num_train_epochs": "2", "global_batch_size": "10", "per_device_train_batch_size": None, **options}
    one, two = make_job(**shared), make_job(**shared, nproc_per_node="2", distribution=distribution)
    logs = finish(one), finish(two)
    check_metrics_are_alike(
        logs[1], logs[0], (*KEYS, "eval_loss", "eval_margin", "eval_max_reward"), rel=1e-3, abs=1e-5
    )
    assert two.manifest["export"]["proven"]


@pytest.mark.long
def test_packed_pairs_learn_what_padded_ones_do(make_job):
    shared = {"train_sampling_strategy": "random"}
    packed, padded = make_job(**shared), make_job(**shared, packing="false")
    logs = finish(packed), finish(padded)
    assert "Packing: the rows of a batch share sequences" in logs[0]
    check_metrics_are_alike(logs[0], logs[1], KEYS, rel=1e-4, abs=1e-6)


@pytest.mark.long
def test_a_reward_model_is_trained_on(make_job):
    """Its head is the earlier one: the first step's loss is far below that of a new head."""
    first = make_job(num_train_epochs="4", **FULL)
    finish(first)
    tree = make_job(logging_steps="1")
    for file in (tree.base_dir / "input/data/model").iterdir():
        file.unlink()
    for file in (first.base_dir / "model").iterdir():
        tree.write(f"input/data/model/{file.name}", file.read_bytes())
    log = finish(tree)
    assert metrics_of(log, "accuracy")[0] > 0.9
    assert tree.manifest["export"]["proven"]


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"torch_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_quantized_base_gets_a_head_in_float32(make_job, options):
    tree = make_job(load_in_4bit="true", merge_weights="true", merge_base="dequantized", **options)
    finish(tree)
    assert tree.manifest["export"]["proven"]
    adapter = load_file(tree.base_dir / "model/adapter/adapter_model.safetensors")
    assert adapter["base_model.model.score.weight"].dtype == torch.float32


@pytest.mark.long
def test_an_adapter_is_merged_later(make_job, tmp_path):
    tree = make_job(num_train_epochs="2")
    finish(tree)
    model, base = tree.base_dir / "model", tree.base_dir / "input/data/model"
    assert merge_adapter(MergeOptions(str(model), str(tmp_path / "merged"), str(base))) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    adapted = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = PeftModel.from_pretrained(adapted, model)
    assert compute_reward(merged, model) == pytest.approx(compute_reward(adapted, model), rel=1e-4)
    assert merged.config.pad_token_id == AutoTokenizer.from_pretrained(model).pad_token_id


def test_what_cannot_be_a_reward_model_is_told_before_weights_load(make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    tree = make_job(sample_prompts="2")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    config = json.loads((tree.base_dir / "input/data/model/config.json").read_text())
    tree.write("input/data/model/config.json", {**config, "model_type": "granite"})
    with patch.dict(os.environ):
        problems = examine_job((), in_colour=False).list_texts("error")
    assert "sample_prompts=2 with method=reward: a reward model answers no prompts; remove it." in problems
    assert any("is of type granite, for which Transformers has no model with a head" in text for text in problems)
    tree.write("input/data/model/config.json", config)
    tree.change(sample_prompts=None)
    with patch.dict(os.environ):
        assert examine_job((), in_colour=False).list_texts("error") == []
