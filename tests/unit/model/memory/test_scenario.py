# SPDX-License-Identifier: Apache-2.0
"""A job's memory scenario: the ways that its settings leave open, and its copies with other settings."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from llm_trainer.common.units import GIB
from llm_trainer.config.schema import Settings
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.device import Device
from llm_trainer.model.memory.scenario import (
    MemoryScenario,
    MemorySettings,
    ParallelismPlan,
    Target,
    list_parallelism_plans,
)

CONFIG = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GPU = Device(torch.device("cuda", 0), "NVIDIA H100", (9, 0))


def sections(**options) -> MemorySettings:
    given = Settings(**options)
    return MemorySettings(given.model, given.adapter, given.data, given.training, given.parallelism, given.methods)


def make_scenario(longest_row=100, attention="sdpa", device=GPU, **options) -> MemoryScenario:
    return MemoryScenario(CONFIG, sections(**options), longest_row, Target(device, 2, 10 * GIB), attention)


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({}, ["DDP", "DDP+c", "FSDP", "FSDP+c", "DDP+c+o", "FSDP+c+o"]),
        ({"distribution": "fsdp"}, ["FSDP", "FSDP+c", "FSDP+c+o"]),
        ({"gradient_checkpointing": True, "distribution": "ddp"}, ["DDP+c", "DDP+c+o"]),
        ({"gradient_checkpointing": False, "activation_offloading": True, "distribution": "ddp"}, ["DDP+o"]),
        ({"activation_offloading": False, "distribution": "ddp"}, ["DDP", "DDP+c"]),
    ],
    ids=str,
)
def test_ways_are_those_that_the_settings_leave_open_cheapest_first(options, ways):
    plans = list_parallelism_plans(sections(**options), Target(GPU, 2, 10 * GIB))
    short = [
        ("FSDP" if plan.sharded else "DDP") + "+c" * plan.recompute_activations + "+o" * plan.offload_activations
        for plan in plans
    ]
    assert short == ways


def test_one_device_has_nothing_to_shard():
    assert not any(plan.sharded for plan in list_parallelism_plans(sections(), Target(GPU, 1, GIB)))


def test_ways_have_names_for_messages():
    plan = ParallelismPlan(sharded=True, recompute_activations=True, offload_activations=True)
    assert plan.describe(8) == "FSDP with gradient checkpointing and activation offloading"
    plan = ParallelismPlan(False, True, False, kept_layers=20, num_layers=32)
    assert plan.describe(8) == "DDP with gradient checkpointing of 12 of 32 layers"
    assert ParallelismPlan(False, False, False).describe(1) == "training"
    assert ParallelismPlan(False, False, False).describe(2) == "DDP"


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 100),
        ({"max_length": 64}, 64),
        ({"max_length": 512}, 100),
        ({"max_length": 512, "packing": True}, 512),
        ({"pad_to_multiple_of": 64}, 128),
    ],
)
def test_a_sequence_is_as_long_as_the_longest_row_that_is_left(options, length):
    assert make_scenario(**options).length == length


@pytest.mark.parametrize(("longest_text", "sharded", "length"), [(120, True, 120), (90, True, 100), (120, False, 100)])
def test_a_sharded_batch_of_texts_is_longer_by_a_white_image(longest_text, sharded, length):
    scenario = replace(make_scenario(), images=RowImages({}, longest_text=longest_text))
    assert scenario.build_step(ParallelismPlan(sharded, False, False)).length == length


def test_a_kernel_that_reads_lengths_has_no_mask():
    assert make_scenario().has_mask
    assert not make_scenario(attention="flash_attention_2").has_mask
    assert not make_scenario(per_device_train_batch_size=1, packing=False).has_mask


def test_copies_keep_the_shape_unless_it_changes():
    scenario = make_scenario()
    shape = scenario.shape
    smaller = scenario.replace_settings(per_device_train_batch_size=1)
    assert smaller.shape is shape
    assert smaller.settings.training.is_given("per_device_train_batch_size")
    assert scenario.replace_target(world_size=8).shape is shape
    assert scenario.replace_settings(use_peft=False).shape is not shape


def test_less_is_needed_where_more_is_saved():
    scenario = make_scenario(longest_row=256)
    plain, saving = (
        scenario.estimate(ParallelismPlan(False, recomputes, False)).total_bytes for recomputes in (False, True)
    )
    assert saving < plain
    need = scenario.estimate(ParallelismPlan(False, False, False))
    assert scenario.replace_target(free_bytes=need.total_bytes).can_hold(need)
    assert not scenario.replace_target(free_bytes=need.total_bytes - 1).can_hold(need)


@pytest.mark.parametrize(
    ("options", "first", "passes", "copies"),
    [
        ({}, False, 0, False),
        ({"method": "dpo"}, False, 1, False),
        ({"method": "dpo", "precompute_ref_log_probs": True}, True, 0, False),
        ({"method": "dpo", "use_peft": False}, True, 0, False),
        ({"method": "dpo", "adapter_path": "adapter"}, False, 1, True),
        ({"method": "dpo", "init_lora_weights": "pissa"}, False, 1, True),
        ({"method": "kto"}, False, 3, False),
        ({"method": "kto", "use_peft": False}, True, 1, False),
        ({"method": "kto", "loss_type": "apo_zero_unpaired"}, False, 1, False),
        ({"method": "kto", "loss_type": "apo_zero_unpaired", "use_peft": False}, True, 0, False),
        ({"method": "grpo"}, False, 0, False),
        ({"method": "grpo", "beta": 0.04, "num_iterations": 4}, False, 0.5, False),
        ({"method": "rloo"}, False, 2, False),
    ],
    ids=str,
)
def test_a_reference_is_asked_first_or_with_each_batch(options, first, passes, copies):
    scenario = make_scenario(**options)
    asked = scenario.settings
    assert (asked.asks_reference_first, scenario.untrained_passes, asked.copies_adapter) == (first, passes, copies)


def test_a_reference_that_is_asked_first_counts_like_an_evaluation():
    def estimate(**options):
        scenario = make_scenario(method="dpo", max_length=64, **options)
        return scenario.estimate(list_parallelism_plans(scenario.settings, scenario.target)[0]).peak_bytes

    assert estimate(precompute_ref_log_probs=True, precompute_ref_batch_size=512) > estimate() * 2
    assert estimate(precompute_ref_log_probs=True, precompute_ref_batch_size=1) == estimate()


def test_a_copy_of_the_adapter_takes_its_bytes():
    need = make_scenario(method="dpo", init_lora_weights="pissa").estimate(ParallelismPlan(False, False, False))
    assert need.parts["reference's adapter"] == need.parts["adapter"] > 0
