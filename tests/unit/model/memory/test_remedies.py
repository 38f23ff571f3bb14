# SPDX-License-Identifier: Apache-2.0
"""Changes that would make a job fit are tried before they are proposed, the cheapest first."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from llm_trainer.common.units import GIB
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.memory import remedies
from llm_trainer.model.memory.global_batch import split_global_batch
from llm_trainer.model.memory.remedies import count_usable_bytes, estimate_at_best, find_smallest_gpu, list_remedies
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target

CONFIG = LlamaConfig(
    vocab_size=4000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
)


def make_scenario(free_bytes: int, **options) -> MemoryScenario:
    given = Settings(**options)
    settings = MemorySettings(given.model, given.adapter, given.data, given.training, given.parallelism)
    device = Device(torch.device("cuda", 0), "NVIDIA H100", (9, 0))
    return MemoryScenario(CONFIG, settings, 1024, Target(device, 1, free_bytes), "flash_attention_2")


@pytest.mark.parametrize(("gib", "size"), [(1, 16), (13.9, 16), (14.6, 24), (22, 32), (139.1, 141), (268, None)])
def test_the_smallest_gpu_leaves_the_driver_its_share(gib, size):
    assert find_smallest_gpu(SimpleNamespace(total_bytes=int(gib * GIB))) == size


def test_the_same_batch_comes_in_smaller_pieces():
    scenario = make_scenario(GIB, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    assert [text for text, _ in remedies.shrink_batch(scenario)] == [
        "per_device_train_batch_size=3 with gradient_accumulation_steps=4",
        "per_device_train_batch_size=1 with gradient_accumulation_steps=12",
    ]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"per_device_train_batch_size": 4}, ["per_device_train_batch_size=2", "per_device_train_batch_size=1"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps=4", "gradient_accumulation_steps=8"]),
    ],
)
def test_a_global_batch_needs_one_of_the_pieces(given, texts):
    split = split_global_batch(make_scenario(10**15, global_batch_size=8, **given))
    assert [text for text, _ in remedies.shrink_batch(split)] == texts


def test_more_gpus_are_proposed_as_long_as_they_can_share_the_global_batch():
    split = split_global_batch(make_scenario(10**15, global_batch_size=12))
    proposed = [text for text, _ in remedies.add_gpus(split)]
    assert [text.partition(" ")[0] for text in proposed] == ["2", "4"]


def test_what_is_proposed_fits_and_the_cheapest_comes_first():
    scenario = make_scenario(10**15, per_device_train_batch_size=8, gradient_checkpointing=False)
    small = scenario.replace_settings(per_device_train_batch_size=1)
    needs = [estimate_at_best(each).total_bytes for each in (scenario, small)]
    assert needs[1] < needs[0]
    tight = scenario.replace_target(free_bytes=(needs[0] + needs[1]) // 2)
    proposed = list(list_remedies(tight))
    assert proposed[0].startswith("per_device_train_batch_size=")
    assert any(text.startswith("GPUs of 16 GB") for text in proposed)
    assert len(proposed) == len(set(proposed))


@pytest.mark.long
def test_several_changes_are_combined_where_one_is_too_little():
    scenario = make_scenario(1, use_peft=False)
    *_, last = list_remedies(scenario.replace_target(free_bytes=count_usable_bytes(16) // 200))
    assert last


def test_nothing_is_proposed_that_is_there_already():
    scenario = make_scenario(GIB, load_in_4bit=True, optim="adamw_8bit", gradient_checkpointing=True)
    for kind in (remedies.recompute_activations, remedies.use_fsdp, remedies.use_small_optimizer):
        assert not [*kind(scenario)]
    assert not [*remedies.quantize_base(scenario)]
    assert not [*remedies.train_adapter(scenario)]
