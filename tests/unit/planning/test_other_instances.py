# SPDX-License-Identifier: Apache-2.0
"""The instances that matter for a job that has ended, by the speed that it had."""

import pytest

from llm_trainer.planning.candidates import list_candidates
from llm_trainer.planning.other_instances import add_other_instances
from support.planned_jobs import PRICES, outline_job


def describe_job(outline, gpu, instance_type, share=2.0):
    shape = outline.fitter.job.shape
    compared = {
        "instance_type": instance_type,
        "gpu": gpu,
        "planned": {"step_seconds": 1.0, "start_seconds": 10.0},
        "actual": {"step_seconds": share, "start_seconds": 10.0},
    }
    sizes = {"parameters": shape.count_weights(), "trainable_parameters": shape.num_trained}
    return {**sizes, "planned_and_actual": compared}


def test_a_gpu_that_was_slow_is_slow_in_other_numbers_too():
    outline = outline_job(lengths={100: 1_000_000}, prices=PRICES)
    manifest = describe_job(outline, "A10G", "ml.g5.xlarge", share=50.0)
    add_other_instances(outline, manifest)
    chosen = manifest["planned_and_actual"]["instances"]
    assert chosen["cheapest"]["gpu"] == "A100 40GB"  # of the three with a price, one that was not seen to be slow
    assert chosen["cheapest"]["settings"]["per_device_train_batch_size"] == 2
    planned = next(each for each in list_candidates(outline) if each.dollars is not None)
    assert planned.host.gpu.name == "A10G"


@pytest.mark.parametrize("compared", [{}, {"gpu": "CPU", "instance_type": "ml.c5.xlarge"}])
def test_a_job_on_cpus_or_without_a_plan_is_left_as_it_is(compared):
    manifest = {"planned_and_actual": dict(compared)}
    add_other_instances(outline_job(lengths={100: 1000}), manifest)
    assert manifest == {"planned_and_actual": compared}
