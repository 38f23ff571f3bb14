# SPDX-License-Identifier: Apache-2.0
"""How many layers are recomputed changes no weight: on two ranks, sharded or not, and from one start to the next."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.config.schema import Settings
from llm_trainer.model.memory.fit import MemoryPlan
from llm_trainer.model.memory.scenario import ParallelismPlan
from llm_trainer.training.methods import choose_method
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
from support.trainers import StopAfter, build_run_context, collect_sources, spawn_ranks

pytestmark = pytest.mark.long

NUM_RANKS, NUM_LAYERS, NUM_STEPS = 2, 2, 4
DROPOUT = 0.2  # of the attention, which a layer that is computed again has to draw again


def build(base, folder, parallelism):
    model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=DROPOUT, attn_implementation="eager")
    settings = Settings(use_peft=False, max_steps=NUM_STEPS, per_device_train_batch_size=2)
    plan = MemoryPlan(parallelism, None, "asked for")
    sources = collect_sources(settings, folder)
    arguments = build_arguments(choose_method(), sources, torch.device("cpu"), torch.float32, plan)
    rows = [{"input_ids": [5 + n] * 8, "labels": [5 + n] * 8, "length": 8} for n in range(2 * NUM_RANKS * NUM_STEPS)]
    parts = TrainerParts(
        model,
        AutoTokenizer.from_pretrained(base),
        arguments,
        {"train": Dataset.from_list(rows)},
        None,
        None,
        parallelism.kept_layers,
    )
    return build_trainer(choose_method(), parts, build_run_context(), patience=None)


def read_weights(trainer):
    """This rank's share of the trained weights."""
    weights = dict(trainer.model.named_parameters())
    return {name: getattr(weight, "_local_tensor", weight).detach().clone() for name, weight in weights.items()}


def train_as_rank(number, base, folder, sharded):
    """Train without recomputation, and stopped in the middle with ever more recomputed layers; compare the weights."""
    with pytest.MonkeyPatch.context() as variables:
        for name in ("RANK", "LOCAL_RANK"):
            variables.setenv(name, str(number))
        dist.init_process_group("gloo")
        nothing = ParallelismPlan(sharded, recompute_activations=False, offload_activations=False)
        half = replace(nothing, recompute_activations=True, kept_layers=1, num_layers=NUM_LAYERS)
        whole = build(base, folder / "whole", nothing)
        whole.train_from(None)
        first = build(base, folder / "parts", half)
        first.add_callback(StopAfter(2))
        first.train_from(None)
        dist.barrier()
        second = build(base, folder / "parts", replace(half, kept_layers=0))
        second.train_from(folder / "parts/checkpoint-2")
        assert second.state.global_step == whole.state.global_step == NUM_STEPS
        expected, found = read_weights(whole), read_weights(second)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_recomputed_layers_change_no_weight_and_a_run_goes_on_with_others(tiny_model, tmp_path, monkeypatch, sharded):
    spawn_ranks(train_as_rank, (tiny_model, tmp_path, sharded), NUM_RANKS, monkeypatch)
