# SPDX-License-Identifier: Apache-2.0
"""Interruptions of spot instances are to be expected by hour and instance, and cost work and starts."""

import pytest

from llm_trainer.planning.cost import HOURS_A_MONTH, INTERRUPTIONS_A_MONTH, expect_interruptions


def test_an_interruption_costs_half_of_what_lies_between_checkpoints_and_a_start():
    run = expect_interruptions(HOURS_A_MONTH, start_hours=0.1, between_hours=0.2, count=1)
    assert run.interruptions == pytest.approx(INTERRUPTIONS_A_MONTH, rel=0.001)
    assert run.hours == pytest.approx(HOURS_A_MONTH + run.interruptions * 0.2)


def test_more_instances_are_interrupted_more_often():
    one, many = (expect_interruptions(100, 0.1, 0.25, count) for count in (1, 16))
    assert many.interruptions == pytest.approx(16 * one.interruptions, rel=0.01)
    assert many.hours > one.hours > 100


def test_a_start_that_takes_longer_than_instances_live_stays_finite():
    assert expect_interruptions(100, 10_000, 1, 16).hours < 1e8
