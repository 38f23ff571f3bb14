# SPDX-License-Identifier: Apache-2.0
"""The pieces in which devices take a global batch."""

import pytest
from transformers import LlamaConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.units import GIB
from llm_trainer.config.schema import Settings
from llm_trainer.model.memory.fit import ELSEWHERE
from llm_trainer.model.memory.global_batch import UNKNOWN_MODEL_ROWS, find_shortage, split_global_batch
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, ParallelismPlan, Target
from llm_trainer.model.memory.shape import UnknownShapeError

FEW_LAYERS = LlamaConfig(
    vocab_size=4000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16
)
WITHOUT_RECOMPUTATION = ParallelismPlan(sharded=False, recompute_activations=False, offload_activations=False)


def build(num_gpus, gib, **options):
    given = Settings(**options)
    sections = MemorySettings(given.model, given.adapter, given.data, given.training, given.parallelism)
    target = Target(ELSEWHERE, world_size=num_gpus, free_bytes=int(gib * GIB))
    return MemoryScenario(FEW_LAYERS, sections, 1024, target, "flash_attention_2")


def pieces_of(scenario):
    training = scenario.settings.training
    return training.per_device_train_batch_size, training.gradient_accumulation_steps


@pytest.mark.parametrize(("num_gpus", "gib"), [(1, 8), (4, 8), (2, 1000)])
def test_the_most_rows_that_fit_without_recomputation_are_taken(num_gpus, gib):
    split = split_global_batch(build(num_gpus, gib, global_batch_size=64))
    rows, steps = pieces_of(split)
    assert rows * steps * num_gpus == 64
    assert split.can_hold(split.estimate(WITHOUT_RECOMPUTATION))
    if steps > 1:
        twice = split.replace_settings(per_device_train_batch_size=2 * rows)
        assert not twice.can_hold(twice.estimate(WITHOUT_RECOMPUTATION))


def test_rows_whose_step_takes_too_long_to_follow_are_too_many(monkeypatch):
    estimate = MemoryScenario.estimate

    def fail_on_many(self, plan):
        if self.settings.training.per_device_train_batch_size > 4:
            raise UnknownShapeError("it takes too long to follow")
        return estimate(self, plan)

    monkeypatch.setattr(MemoryScenario, "estimate", fail_on_many)
    assert pieces_of(split_global_batch(build(1, 1000, global_batch_size=64))) == (4, 16)


def test_rows_are_taken_one_by_one_where_nothing_fits():
    assert pieces_of(split_global_batch(build(2, 0.1, global_batch_size=24))) == (1, 12)


def test_fewer_devices_may_be_too_few_for_a_sharded_model():
    scenario = split_global_batch(build(8, 2.5, global_batch_size=64, use_peft=False, distribution="fsdp"))
    assert find_shortage(scenario, 8) is None
    assert "needs" in find_shortage(scenario, 2)


def test_what_is_given_stays():
    assert pieces_of(split_global_batch(build(2, 1000, global_batch_size=24, per_device_train_batch_size=3))) == (3, 4)
    assert pieces_of(split_global_batch(build(2, 1000, global_batch_size=24, gradient_accumulation_steps=6))) == (2, 6)
    scenario = build(2, 1000)
    assert split_global_batch(scenario) is scenario


def test_what_is_derived_does_not_count_as_given_and_outlasts_other_changes():
    training = split_global_batch(build(2, 1000, global_batch_size=24)).settings.training
    assert not training.is_given("per_device_train_batch_size", "gradient_accumulation_steps")
    changed = training.replace(optim="adamw_8bit")
    assert changed.per_device_train_batch_size == training.per_device_train_batch_size == 12


def test_devices_that_cannot_share_the_batch_end_the_job():
    with pytest.raises(UserError, match=r"cannot be shared by 5 devices: give 20 or 25\."):
        split_global_batch(build(5, 1000, global_batch_size=24))


def test_a_model_whose_memory_is_not_known_takes_few_rows(monkeypatch):
    def fail(self, plan):
        raise UnknownShapeError("it is new")

    monkeypatch.setattr(MemoryScenario, "estimate", fail)
    rows, steps = pieces_of(split_global_batch(build(1, 1000, global_batch_size=48)))
    assert (rows, steps) == (UNKNOWN_MODEL_ROWS, 6)
