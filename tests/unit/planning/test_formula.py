# SPDX-License-Identifier: Apache-2.0
"""The memory of a step by formula lies near what the trace counts, and knows what saves memory."""

from dataclasses import replace

import pytest

from llm_trainer.model.memory.scenario import ParallelismPlan
from llm_trainer.planning.formula import estimate_by_formula
from llm_trainer.planning.instances import read_instances
from support.planned_jobs import outline_job

PLAIN = ParallelismPlan(sharded=False, recompute_activations=False, offload_activations=False)


@pytest.fixture(scope="module")
def scenario():
    gpu = read_instances().types["ml.p4d.24xlarge"].gpu
    return outline_job(per_device_train_batch_size=8, use_peft=False).fitter.move_to(gpu).replace_target(world_size=8)


def test_it_lies_near_the_trace(scenario):
    found, traced = estimate_by_formula(scenario, PLAIN), scenario.estimate(PLAIN)
    assert 0.4 < found.parts["activations"] / traced.parts["activations"] < 2.5
    assert found.parts["optimizer"] == traced.parts["optimizer"]


def test_each_saving_saves(scenario):
    whole = estimate_by_formula(scenario, PLAIN)
    sharded = estimate_by_formula(scenario, replace(PLAIN, sharded=True))
    recomputed = estimate_by_formula(scenario, replace(PLAIN, recompute_activations=True))
    offloaded = estimate_by_formula(scenario, replace(PLAIN, offload_activations=True))
    assert sharded.parts["weights"] < whole.parts["weights"] / 7
    assert recomputed.parts["activations"] < whole.parts["activations"] / 10
    assert (offloaded.parts["activations"], offloaded.host_bytes) == (0, whole.parts["activations"])
