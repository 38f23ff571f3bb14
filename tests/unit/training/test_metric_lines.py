# SPDX-License-Identifier: Apache-2.0
"""The figures of a metric line: what of the time counts as training, for whom, and since when."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from llm_trainer.common.metric_definitions import METRICS
from llm_trainer.journal.journal import Journal
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.memory.peak import Peak
from llm_trainer.training import metric_lines
from llm_trainer.training.methods.sft import SFT
from llm_trainer.training.metric_lines import MetricLines


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A training that went on from step 10, on four devices, of which each could train 1,000 tokens a second."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metric_lines.time, "monotonic", lambda: clock.now)
    journal = Journal(tmp_path / "metrics.jsonl")
    trainer = SimpleNamespace(
        num_tokens=50_000, checkpoint_seconds=0.0, run=SimpleNamespace(has_logging_interval=False)
    )
    lines = MetricLines(trainer, SFT, Timeline(0.0, journal, "algo-1"), Peak(torch.device("cpu")), 1000.0)
    state = TrainerState(max_steps=40, logging_steps=10, global_step=10, epoch=0.25, is_world_process_zero=True)
    arguments = SimpleNamespace(world_size=4, logging_strategy="steps")
    lines.on_train_begin(arguments, state, TrainerControl())

    def log(step, seconds, **logs):
        clock.now += seconds
        state.global_step = step
        lines.on_log(arguments, state, TrainerControl(), logs=logs)

    def save(seconds):
        clock.now += seconds
        trainer.checkpoint_seconds = seconds
        lines.on_save(arguments, state, TrainerControl())

    read = lambda: [json.loads(line) for line in journal.file.read_text().splitlines()]  # noqa: E731
    return SimpleNamespace(log=log, save=save, read=read, state=state, lines=lines, arguments=arguments)


def test_speed_counts_from_where_a_resumed_run_began(run, capsys):
    run.log(15, 10.0, loss=0.5, num_tokens=70_000.0, epoch=0.5)
    (record,) = run.read()
    values = record["values"]
    assert (record["step"], record["total_steps"], record["epoch"]) == (15, 40, 0.5)
    assert values["tokens_per_second"] == pytest.approx(2000)
    assert values["tokens_per_second_per_device"] == pytest.approx(500)
    assert values["mfu"] == pytest.approx(0.5)
    assert values["seconds_per_step"] == pytest.approx(2)
    assert values["memory_gib"] >= 0
    assert values.keys() | record.keys() - {"time", "kind", "values"} < METRICS.keys()
    assert "; mfu=0.5; " in capsys.readouterr().out


def test_evaluations_and_checkpoints_are_no_training(run):
    run.log(11, 1.0, loss=0.5, num_tokens=51_000.0)
    run.log(11, 7.0, eval_loss=0.6, eval_entropy=2.0, eval_runtime=7.0)  # entropy is hidden in both
    run.save(3.0)
    run.log(12, 1.0, loss=0.5, num_tokens=52_000.0)
    _, evaluation, last = (record["values"] for record in run.read())
    assert evaluation == {"eval_loss": 0.6, "eval_runtime": 7.0}
    assert last["tokens_per_second"] == pytest.approx(1000)
    assert last["seconds_per_step"] == pytest.approx(1)


def test_a_line_is_shown_with_what_transformers_adds_to_it(run):
    run.log(12, 1.0, loss=0.5, num_tokens=51_000.0, train_runtime=1.0, num_input_tokens_seen=9, total_flos=1.0)
    (record,) = run.read()
    assert record["values"].keys() <= METRICS.keys()
    assert record["values"]["train_loss"] == 0.5


def test_totals_and_other_ranks_are_no_lines(run, capsys):
    run.log(12, 1.0, train_runtime=5.0, train_loss=0.3)
    run.state.is_world_process_zero = False
    run.log(12, 1.0, loss=0.5, num_tokens=52_000.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("max_steps", "is_given", "interval"),
    [(9, False, 1), (40, False, 4), (99, False, 9), (100, False, 10), (5000, False, 10), (9, True, 10)],
)
def test_a_short_run_has_ten_lines_unless_the_user_says_otherwise(run, max_steps, is_given, interval):
    run.lines.trainer.run.has_logging_interval = is_given
    run.state.max_steps, run.state.logging_steps = max_steps, 10
    run.lines.on_train_begin(run.arguments, run.state, TrainerControl())
    assert run.state.logging_steps == interval


@pytest.mark.parametrize(
    ("step", "strategy", "logs"),
    [(39, "steps", False), (40, "steps", True), (40, "epoch", True), (40, "no", False)],
)
def test_the_last_step_has_a_line(run, step, strategy, logs):
    run.state.global_step, run.arguments.logging_strategy = step, strategy
    control = TrainerControl()
    run.lines.on_step_end(run.arguments, run.state, control)
    assert control.should_log == logs
