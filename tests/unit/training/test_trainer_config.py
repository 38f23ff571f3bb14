# SPDX-License-Identifier: Apache-2.0
"""Training arguments: our defaults, and the user's settings, which win."""

import json
import shutil
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import OWN_NAMES, Settings
from llm_trainer.config.sections import ALIASES, OWN_DEFAULTS
from llm_trainer.config.trl_config_fields import read_snapshot
from llm_trainer.model.memory.fit import MemoryPlan
from llm_trainer.model.memory.scenario import ParallelismPlan
from llm_trainer.training.methods import choose_method
from llm_trainer.training.trainer_config import (
    TrainerParts,
    build_arguments,
    build_trainer,
    choose_defaults,
    join_cpu_ranks,
    prepare_config,
)
from support.trainers import build_run_context, collect_sources


def build(tmp_path, has_validation=False, **settings):
    sources = collect_sources(Settings(**settings), tmp_path, has_validation)
    return build_arguments(choose_method(), sources, torch.device("cpu"), torch.float32)


def test_the_learning_rate_depends_on_what_is_trained_unless_it_is_given(tmp_path):
    assert build(tmp_path).learning_rate == 2e-4
    assert build(tmp_path, use_peft=False).learning_rate == 2e-5
    assert build(tmp_path, learning_rate=0.5).learning_rate == 0.5


def test_ranks_look_for_weights_without_a_gradient_only_where_there_may_be_some(tmp_path):
    sources = collect_sources(Settings(), tmp_path)
    for idle in (True, False):
        arguments = choose_defaults(replace(sources, leaves_idle=idle), torch.device("cpu"), torch.float32, None)
        assert arguments["ddp_find_unused_parameters"] == idle


@pytest.mark.parametrize("given", [{}, {"bf16": True}, {"fp16": True}])
def test_shards_of_gradients_are_summed_in_float32(tmp_path, monkeypatch, given):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the libraries change
    sources = collect_sources(Settings(distribution="fsdp", **given), tmp_path)
    plan = MemoryPlan(ParallelismPlan(True, False, False), None, "asked for")
    arguments = build_arguments(choose_method(), sources, torch.device("cpu"), torch.float32, plan)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(next(iter(given), None))
    policy = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args).mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (mixed, torch.float32, mixed)


def test_evaluations_and_saves_follow_the_data_and_the_settings(tmp_path):
    assert (build(tmp_path).eval_strategy, build(tmp_path, has_validation=True).eval_strategy) == ("no", "epoch")
    assert build(tmp_path, has_validation=True, eval_steps=5).eval_strategy == "steps"
    assert (build(tmp_path).save_strategy, build(tmp_path, save_steps=5).save_strategy) == ("no", "steps")
    stopping = build(tmp_path, has_validation=True, early_stopping=True, eval_steps=5)
    assert (stopping.save_strategy, stopping.save_steps, stopping.load_best_model_at_end) == ("steps", 5, True)


def test_the_best_weights_are_those_of_the_metric(tmp_path):
    best = build(tmp_path, has_validation=True, load_best_model_at_end=True)
    assert (best.save_strategy, best.metric_for_best_model, best.greater_is_better) == ("epoch", "eval_loss", False)
    metric = {"metric_for_best_model": "mean_token_accuracy"}
    assert build(tmp_path, has_validation=True, early_stopping=True, **metric).greater_is_better
    assert build(tmp_path, has_validation=True, save_strategy="best").metric_for_best_model == "eval_loss"


def test_defaults_that_differ_from_trls_are_told_to_users(tmp_path):
    sources = collect_sources(Settings(early_stopping=True, eval_steps=5), tmp_path, True)
    defaults = choose_defaults(sources, torch.device("cpu"), torch.float32, None)
    assert set(defaults) <= {*OWN_DEFAULTS, *OWN_NAMES, *ALIASES}
    for name, text in OWN_DEFAULTS.items():
        same = text == str(read_snapshot()[name].default)
        assert not same, f"{name} needs no words: TRL has the same default"


def test_others_act_on_rows_checkpoints_and_trackers(tmp_path):
    arguments = build(tmp_path, max_length=64, packing=True, report_to=["wandb"], resume_from_checkpoint="true")
    assert (arguments.max_length, arguments.packing, arguments.resume_from_checkpoint) == (None, False, None)
    assert arguments.output_dir == str(tmp_path)
    assert not set(arguments.report_to or []) - {"none"}


def test_ranks_on_cpus_wait_as_long_as_ddp_timeout_says(monkeypatch):
    """Transformers gives the setting to the group of GPUs alone."""
    made = []
    monkeypatch.setattr(distributed, "init_process_group", lambda *args, **words: made.append((args, words)))
    join_cpu_ranks(torch.device("cpu"), 7)  # alone: there is no group
    monkeypatch.setenv("WORLD_SIZE", "2")
    join_cpu_ranks(torch.device("cuda", 0), 7)
    assert made == []
    join_cpu_ranks(torch.device("cpu"), 7)
    assert made == [(("gloo",), {"timeout": timedelta(seconds=7)})]


def test_a_value_that_transformers_refuses_is_a_mistake_of_the_users(tmp_path):
    with pytest.raises(UserError, match=r"^Transformers refuses these settings: .*\.$"):
        build(tmp_path, load_best_model_at_end=True, eval_strategy="no", save_strategy="steps")


def test_a_checkpoint_is_written_where_the_bases_generation_config_contradicts_itself(tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    prepare_config(model, tokenizer)
    assert "contradicts itself in temperature" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "checkpoint")
    assert "temperature" not in (tmp_path / "checkpoint/generation_config.json").read_text()
    prepare_config(model, tokenizer)
    assert "contradicts" not in capsys.readouterr().out


def train_recomputing(tiny_model, folder, memory_plan):
    """The trained weights, and how often each layer's MLP was computed, forward and again."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.2, attn_implementation="eager")
    calls = [0 for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    sources = collect_sources(Settings(use_peft=False, max_steps=2, per_device_train_batch_size=2), folder)
    arguments = build_arguments(choose_method(), sources, torch.device("cpu"), torch.float32, memory_plan)
    rows = Dataset.from_list([{"input_ids": [5 + n] * 8, "labels": [5 + n] * 8} for n in range(4)])
    parts = TrainerParts(model, tokenizer, arguments, {"train": rows}, None, None, memory_plan.kept_layers)
    trainer = build_trainer(choose_method(), parts, build_run_context(), patience=None)
    trainer.train()
    return calls, {name: weight.detach() for name, weight in trainer.model.named_parameters()}


def test_the_last_layers_keep_their_activations_and_the_result_is_the_same(tiny_model, tmp_path):
    ways = ParallelismPlan(False, False, False), ParallelismPlan(False, True, False)
    ways = *ways, replace(ways[1], kept_layers=1, num_layers=2)
    (none, plain), (every, all_again), (first, some) = (
        train_recomputing(tiny_model, tmp_path / str(number), MemoryPlan(way, None, "asked for"))
        for number, way in enumerate(ways)
    )
    assert (none, every, first) == ([2, 2], [4, 4], [4, 2])
    for name, weight in plain.items():
        assert torch.equal(weight, all_again[name]) and torch.equal(weight, some[name])
