# SPDX-License-Identifier: Apache-2.0
"""The time of a job is the sum of its parts, each of which grows with what it does."""

from dataclasses import replace

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.run_time import EVALUATION_SHARE, Sizes, Steps, count_checkpoints, count_evaluations, time_run

P4D = read_instances().types["ml.p4d.24xlarge"]
STEPS = Steps(1000, 2.0, 1.8, 2.6, 10**7, 0, 0, 5e4, checkpoints=10)
SIZES = Sizes(base=16 * 10**9, checkpoint=10**9, result=10**8)


def test_the_parts_make_the_whole_and_lie_within_the_range():
    run = time_run(P4D, 1, STEPS, SIZES)
    assert run.steps == 2000
    assert run.checkpoints == pytest.approx(10 * 0.5)  # ten a run, at 2 GB/s
    assert run.seconds == run.start + run.steps + run.evaluations + run.checkpoints + run.export
    assert run.low < run.seconds < run.high
    assert run.hours == run.seconds / 3600


@pytest.mark.parametrize(
    ("settings", "seconds", "number"),
    [
        ({}, 2000, 10),
        ({}, 100_000, 112),  # every quarter of an hour
        ({"save_steps": 300}, 2000, 4),
        ({"save_steps": 0.5}, 2000, 2),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, 2000, 2),
        ({"save_strategy": "no"}, 2000, 0),
        ({"use_checkpoints": False}, 2000, 0),
    ],
)
def test_checkpoints_are_counted_as_the_settings_ask_for_them(settings, seconds, number):
    assert count_checkpoints(Settings(**settings).training, 1000, seconds) == number


@pytest.mark.parametrize(
    ("settings", "number"),
    [({}, 3), ({"eval_strategy": "no"}, 0), ({"eval_steps": 100}, 10), ({"eval_steps": 0.25}, 4)],
)
def test_evaluations_are_counted_as_the_settings_ask_for_them(settings, number):
    assert count_evaluations(Settings(num_train_epochs=3, **settings).training, 1000) == number


def test_evaluations_and_larger_models_take_longer_and_more_hosts_tokenize_sooner():
    plain = time_run(P4D, 1, STEPS, SIZES)
    assert time_run(P4D, 1, replace(STEPS, eval_tokens=10**6), SIZES).evaluations > 0
    assert time_run(P4D, 1, STEPS, replace(SIZES, base=140 * 10**9)).start > plain.start + 200
    assert time_run(P4D, 4, STEPS, SIZES).start < plain.start


def test_a_reference_is_asked_in_the_start_or_makes_evaluations_longer():
    plain, read = time_run(P4D, 1, STEPS, SIZES), replace(STEPS, reference_tokens=10**6)
    first = time_run(P4D, 1, read, SIZES)
    assert first.start - plain.start == pytest.approx(EVALUATION_SHARE * 10**6 / 5e4)
    assert (first.steps, first.low < first.seconds < first.high) == (plain.steps, True)
    each = replace(STEPS, eval_tokens=10**6, untrained_passes=1, evaluation_passes=1)
    alone = time_run(P4D, 1, replace(each, untrained_passes=0, evaluation_passes=0), SIZES).evaluations
    assert time_run(P4D, 1, each, SIZES).evaluations == pytest.approx(alone * 2 / (1 + EVALUATION_SHARE))


def test_kto_asks_the_reference_about_two_answers_of_each_row():
    # The step's pass is the model's own, of other answers.
    read = replace(STEPS, reference_tokens=10**6, untrained_passes=1, evaluation_passes=1)
    asking = time_run(P4D, 1, read, SIZES).start - time_run(P4D, 1, STEPS, SIZES).start
    training = 10**6 / 5e4 / (1 + EVALUATION_SHARE)  # without that pass
    assert asking == pytest.approx(2 * EVALUATION_SHARE * training)
