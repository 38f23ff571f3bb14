# SPDX-License-Identifier: Apache-2.0
"""The time of a job is the sum of its parts, each of which grows with what it does."""

from dataclasses import replace

import pytest

from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.run_time import Sizes, Steps, time_run

P4D = read_instances().types["ml.p4d.24xlarge"]
STEPS = Steps(1000, 2.0, 1.8, 2.6, 10**7, 0, 5e4)
SIZES = Sizes(base=16 * 10**9, checkpoint=10**9, result=10**8)


def test_the_parts_make_the_whole_and_lie_within_the_range():
    run = time_run(P4D, 1, STEPS, SIZES)
    assert run.steps == 2000
    assert run.checkpoints == pytest.approx(10 * 0.5)  # ten a run, at 2 GB/s
    assert run.seconds == run.start + run.steps + run.evaluations + run.checkpoints + run.export
    assert run.low < run.seconds < run.high
    assert run.hours == run.seconds / 3600


def test_a_long_job_saves_every_quarter_of_an_hour():
    run = time_run(P4D, 1, replace(STEPS, number=50_000), SIZES)
    assert run.checkpoints == pytest.approx(100_000 / 900 * 0.5)


def test_evaluations_and_larger_models_take_longer_and_more_hosts_tokenize_sooner():
    plain = time_run(P4D, 1, STEPS, SIZES)
    assert time_run(P4D, 1, replace(STEPS, eval_tokens=10**6), SIZES).evaluations > 0
    assert time_run(P4D, 1, STEPS, replace(SIZES, base=140 * 10**9)).start > plain.start + 200
    assert time_run(P4D, 4, STEPS, SIZES).start < plain.start
