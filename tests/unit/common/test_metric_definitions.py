# SPDX-License-Identifier: Apache-2.0
"""SageMaker's metric definitions read each value of the metric line under its own name, and nothing else."""

import re

import pytest

from llm_trainer.common.metric_definitions import METRICS, RENAMED, define_metrics, format_line

REGEXES = {definition["Name"]: definition["Regex"] for definition in define_metrics()}


def read(name: str, line: str) -> list[float]:
    """What SageMaker would record of one event of the log."""
    return [float(value) for value in re.findall(REGEXES[name], line)]


def test_they_keep_to_the_limits_of_create_training_job():
    assert len(REGEXES) == len(METRICS) <= 40
    for name, regex in REGEXES.items():
        assert re.fullmatch(r"[a-z_]{1,255}", name)
        assert len(regex) <= 500
        assert re.compile(regex).groups == 1


@pytest.mark.parametrize("value", [0.512345678, 0, 20, -3.5, 1e-9, 1.25e7, 123456789.0, 1.7976931348623157e308])
def test_each_key_is_read_wherever_it_stands(value):
    line = format_line(dict.fromkeys(METRICS, value))
    for name in METRICS:
        assert read(name, line) == [pytest.approx(value, rel=1e-5)]
        assert read(name, f"{name}={value:.6g}") == [pytest.approx(value, rel=1e-5)]


def test_no_key_is_read_as_another():
    for name in METRICS:
        line = format_line({key: 1.0 for key in [*METRICS, *RENAMED] if key != name})
        assert read(name, line) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_cloudwatch_does_not_take_is_not_read(value):
    assert read("train_loss", format_line({"train_loss": value, "step": 3})) == []
    assert read("step", format_line({"train_loss": value, "step": 3})) == [3]


def test_rewards_are_defined_as_far_as_there_is_room():
    names = [each["Name"] for each in define_metrics("grpo", ["math", "rewards.py:polite"])]
    assert names[-4:] == [
        *("rewards/math/mean", "rewards/polite/mean"),
        *("eval_rewards/math/mean", "eval_rewards/polite/mean"),
    ]
    assert len(define_metrics("grpo", [f"r.py:f{number}" for number in range(9)])) == 40


def test_other_lines_of_a_log_are_no_metrics():
    for line in ("Setting learning_rate=0.01", "learning_rate='x' is not valid", "  step=3", "lora_step=3; x_step=4"):
        assert all(read(name, line) == [] for name in METRICS)
