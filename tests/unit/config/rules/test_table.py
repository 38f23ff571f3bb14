# SPDX-License-Identifier: Apache-2.0
"""Settings that are each valid and contradict each other break a rule of the table."""

import os
import string
from itertools import product
from typing import Any

import pytest

from llm_trainer.config.rules import table
from llm_trainer.config.rules.table import RULES, supports_fsdp
from llm_trainer.config.schema import FIELDS, Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_", "HF_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def find_broken(**values: Any) -> list[str]:
    settings = Settings(**values)
    return [problem for rule in RULES for problem in rule.find_problems(settings)]


def test_the_defaults_break_no_rule():
    assert find_broken() == []


def test_rules_name_settings_that_exist():
    for rule in RULES:
        assert rule.settings
        assert set(rule.settings) <= set(FIELDS)


def test_messages_name_only_settings_and_what_the_rule_fills_in():
    for rule in RULES:
        places = {name for _, name, _, _ in string.Formatter().parse(rule.message) if name}
        filled = {"uri", "key", "value", "tracker", "fix", "option", "package", "choices", "fault", "nearest"}
        filled |= {"foreign", "methods", "loss", "losses"}
        assert places <= set(FIELDS) | filled, rule


@pytest.mark.parametrize(
    "values",
    [
        {"load_in_4bit": True, "use_peft": False},
        {"load_in_8bit": True, "use_peft": False},
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_4bit": True, "use_mxfp4": True},
        {"load_in_8bit": True, "use_mxfp4": True},
        {"base_compute": "fp8", "use_peft": False},
        {"base_compute": "fp8", "load_in_4bit": True},
        {"base_compute": "fp8", "load_in_8bit": True},
        {"base_compute": "fp8", "torch_dtype": "float32"},
        {"base_compute": "fp8", "fp16": True},
        {"base_compute": "fp8", "use_dora": True},
        {"base_compute": "fp8", "init_lora_weights": "pissa"},
        {"base_compute": "fp8", "distribution": "fsdp"},
        {"base_compute": "fp8", "torch_compile": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": True},
        {"use_liger_kernel": False, "liger_kernel_config": {"rope": False}},
        {"chat_template_path": "s3://bucket/template.jinja"},
        {"resume_from_checkpoint": "s3://bucket/checkpoint-5"},
        {"resume_from_checkpoint": "checkpoint-5"},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
        {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
        {"model_init_kwargs": {"use_safetensors": False}},
        {"model_init_kwargs": {"variant": "fp16"}},
        {"merge_weights": True, "use_peft": False},
        {"merge_base": "bf16"},
        {"merge_base": "dequantized", "merge_weights": True},
        {"merge_base": "dequantized", "merge_weights": True, "load_in_4bit": True, "init_lora_weights": "loftq"},
        {"mlflow_register_model": "name"},
        {"hub_model_id": "a/b"},
        {"push_to_hub": True, "hub_model_id": "a b", "hub_token": "x"},
        {"push_to_hub": True, "hub_model_id": "a/b"},
        {"push_to_hub": True, "hub_model_id": "a/b", "hub_token": "x", "hub_strategy": "every_save"},
        {"push_to_hub": True, "hub_model_id": "a/b", "hub_token": "x", "hub_always_push": True},
        {"torch_dtype": "float16", "use_peft": False},
        {"use_dora": True, "use_peft": False},
        {"target_modules": "q_proj", "use_peft": False},
        {"loraplus_lr_ratio": 16, "use_peft": False},
        {"target_modules": "(q|v"},
        {"use_dora": True, "init_lora_weights": "olora"},
        {"load_in_4bit": True, "init_lora_weights": "pissa"},
        {"load_in_8bit": True, "init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "orthogonal", "lora_r": 3},
        {"bf16": True, "fp16": True},
        {"optim": "lomo"},
        {"optim": "adamw_torch_8bit"},
        {"optim_target_modules": ["q_proj"]},
        {"early_stopping": True, "eval_strategy": "no"},
        {"load_best_model_at_end": True, "eval_strategy": "no"},
        {"metric_for_best_model": "accuracy"},
        {"eval_delay": 11, "eval_steps": 5, "max_steps": 10},
        {"eval_delay": 2, "num_train_epochs": 1},
        {"lr_scheduler_kwargs": "kwargs.json"},
        {"model_init_kwargs": "dtype"},
        {"dataset_kwargs": {"add_special_tokens": False}},
        {"parallelism_config": {"cp_size": 2}},
        {"parallelism_config": {"foo": 1}},
        {"ddp_backend": "mpi"},
        {"dataloader_persistent_workers": True},
        {"dataloader_multiprocessing_context": "spawn"},
        {"dataloader_prefetch_factor": 2},
        {"enable_jit_checkpoint": True},
        {"save_only_model": True},
        {"save_on_each_node": True},
        {"packing": True, "max_length": None},
        {"eval_packing": True, "max_length": None},
        {"streaming": True},
        {"streaming": True, "max_steps": 3, "packing": True},
        {"streaming": True, "max_steps": 3, "shuffle_dataset": True},
        {"streaming": True, "max_steps": 3, "train_sampling_strategy": "sequential"},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": False, "padding_free": True},
        {"packing": False, "eval_packing": True},
        {"train_weights": {"train_a": 0.0}},
        {"distribution": "fsdp", "init_lora_weights": "pissa"},
        {"distribution": "fsdp", "activation_offloading": True, "gradient_checkpointing": False},
    ],
)
def test_each_contradiction_breaks_one_rule(values):
    (problem,) = find_broken(**values)
    assert any(name in problem for name in values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"fsdp": "full_shard"}, "fsdp=full_shard: write distribution=fsdp; fsdp_config may refine it."),
        ({"deepspeed": "zero3.json"}, "deepspeed is not part of this image: use distribution=fsdp, which shards"),
        ({"distribution": "ddp", "fsdp_config": {"min_num_params": 5}}, "with distribution=ddp does nothing"),
        ({"fsdp_config": "fsdp.json"}, "fsdp_config='fsdp.json' is not a JSON object"),
        ({"fsdp_config": {"version": 1}}, "fsdp_config: 'version' is not to be set: use FSDP2, which is always used."),
        ({"fsdp_config": {"cpu_offload": True}}, "it takes auto_wrap_policy, min_num_params, reshard_after_forward"),
        ({"train_weights": {"a": 0.5, "b": -1.0}}, 'train_weights={"a": 0.5, "b": -1.0} is not valid'),
        ({"use_peft": False, "use_dora": True}, "use_dora=true with use_peft=false"),
        ({"use_peft": False, "target_modules": ["a", "b"]}, "target_modules=['a', 'b'] with use_peft=false"),
        ({"push_to_hub": True, "hub_token": "x"}, "push_to_hub=true with hub_model_id=null: give a name such as"),
        ({"lr_scheduler_kwargs": "a.json"}, "lr_scheduler_kwargs='a.json' is not a JSON object"),
    ],
)
def test_a_sentence_shows_the_values_as_users_write_them(values, sentence):
    (problem,) = find_broken(**values)
    assert sentence in problem


@pytest.mark.parametrize(
    "values",
    [
        {"metric_for_best_model": "mean_token_accuracy"},
        {"metric_for_best_model": "loss"},
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        {"eval_delay": 2, "num_train_epochs": 1, "max_steps": 10},
        {"eval_delay": 20, "eval_steps": 5},
        {"ddp_backend": "gloo"},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    ],
)
def test_what_can_hold_together_breaks_no_rule(values):
    assert find_broken(**values) == []


def test_an_optimizer_whose_package_is_missing_is_refused_with_those_that_run():
    (problem,) = find_broken(optim="schedule_free_adamw")
    start, _, choices = problem.rstrip(".").partition(": use one of ")
    assert start == "optim=schedule_free_adamw needs the package schedulefree, which is not installed"
    usable = choices.split(", ")
    assert {"adamw_torch", "adamw_torch_fused", "adafactor", "adamw_8bit", "sgd"} <= set(usable)
    assert not any(find_broken(optim=optim) for optim in usable)


def test_an_optimizer_with_groups_of_its_own_excludes_loraplus(monkeypatch):
    monkeypatch.setattr(table, "find_missing_package", lambda optim: None)
    (problem,) = find_broken(optim="apollo_adamw", optim_target_modules="all-linear", loraplus_lr_ratio=2.5)
    assert problem.startswith("loraplus_lr_ratio=2.5 with optim=apollo_adamw")
    (problem,) = find_broken(optim="galore_adamw")
    assert problem.startswith("optim=galore_adamw without optim_target_modules")


def test_each_key_of_fsdp_config_gets_its_sentence_in_order():
    problems = find_broken(fsdp_config={"z": 1, "fsdp_state_dict_type": "x", "activation_checkpointing": True})
    assert [problem.split("'")[1] for problem in problems] == ["activation_checkpointing", "fsdp_state_dict_type", "z"]


def test_what_cannot_be_sharded_is_what_the_rules_refuse():
    optimizers = ("adamw_torch_fused", "adafactor", "paged_adamw_8bit")
    for quantized, start, optim in product((False, True), ("default", "pissa", "loftq", "orthogonal"), optimizers):
        values = {"load_in_8bit": quantized, "init_lora_weights": start, "optim": optim, "distribution": "fsdp"}
        settings = Settings(**values)
        refused = [problem for problem in find_broken(**values) if " with distribution=fsdp: " in problem]
        assert supports_fsdp(settings.model, settings.adapter, optim) == (not refused)
