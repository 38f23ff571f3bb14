# SPDX-License-Identifier: Apache-2.0
"""Each rule with a job that gives it a reason, which the healthy job does not."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llm_trainer.report.advice import expect_padding, find_advice
from llm_trainer.report.history import read_history
from support.journals import FakeJournal

HOST = "algo-1"
MINUTE = 60


@dataclass
class Job:
    """An hour on two GPUs. As it stands, there is nothing to say about it."""

    losses: list[float] = field(default_factory=lambda: [2 - step / 100 for step in range(100)])
    eval_losses: list[float] = field(default_factory=lambda: [1.9, 1.5, 1.2, 1.1])
    eval_seconds: float = 10
    checkpoint_seconds: float = 5
    start_seconds: dict[str, float] = field(default_factory=lambda: {"download": 60, "data": 30, "model": 30})
    utilization: float = 95
    cpu: float = 40
    memory: float = 80
    throttled: dict[str, int] = field(default_factory=lambda: {"throttled_power_cap": 1, "throttled_hardware": 0})
    clocks: tuple[float, float] = (1830, 1810)
    num_xids: int = 0
    num_cut_rows: int = 2
    lengths: dict[str, int] = field(default_factory=lambda: {"90": 500, "100": 500})
    packing: str = "off"
    attempts: int = 1
    settings: dict[str, int] = field(default_factory=lambda: {"per_device_train_batch_size": 4, "max_length": 2048})

    def advise(self, folder: Path) -> list[str]:
        return [advice.title for advice in find_advice(read_history(self.write(folder / "metrics.jsonl")))]

    def write(self, file: Path) -> Path:
        journal = FakeJournal(file)
        for attempt in range(self.attempts):
            facts = {"hosts": [HOST], "world_size": 2, "settings": self.settings}
            journal.add(attempt, "job", name="trial", attempt=attempt + 1, **facts)
        now = 0.0
        for name, seconds in self.start_seconds.items():
            now += seconds
            journal.add(now, "phase", name=name, seconds=seconds, host=HOST)
        summary = {"num_truncated_rows": self.num_cut_rows, "longest_row_tokens": 4000}
        journal.add(now, "data", split="train", rows=1000, tokens=95_000, lengths=self.lengths, summary=summary)
        for step, loss in enumerate(self.losses, 1):
            at = now + 3600 * step / len(self.losses)
            journal.add(at, "metrics", step=step, total_steps=len(self.losses), values={"train_loss": loss})
            self.add_sample(journal, at)
        for number, loss in enumerate(self.eval_losses, 1):
            at = now + 3600 * number / len(self.eval_losses)
            values = {"eval_loss": loss, "eval_runtime": self.eval_seconds}
            step = number * len(self.losses) // len(self.eval_losses)
            journal.add(at, "metrics", step=step, total_steps=len(self.losses), values=values)
            journal.add(at, "checkpoint", step=step, seconds=self.checkpoint_seconds)
        end = now + 3600
        journal.add(end, "manifest", packing={"mode": self.packing, "reason": "sdpa attention"})
        journal.add(end, "end", status="done", reason=None)
        return journal.write()

    def add_sample(self, journal: FakeJournal, at: float) -> None:
        values = {f"host/{HOST}/cpu_percent": self.cpu}
        for gpu, clock in enumerate(self.clocks):
            figures = {
                "utilization_percent": self.utilization,
                "memory_used_bytes": self.memory,
                "memory_total_bytes": 100,
                "sm_clock_mhz": clock,
                "xid_errors": self.num_xids,
                **self.throttled,
            }
            values |= {f"gpu/{HOST}/{gpu}/{name}": value for name, value in figures.items()}
        journal.add(at, "system", host=HOST, values=values)


def test_there_is_nothing_to_say_about_a_healthy_job(tmp_path):
    assert Job().advise(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        (
            {"losses": [2 - step / 100 if step != 40 else math.nan for step in range(100)]},
            "train_loss was not a number",
        ),
        ({"losses": [2.0 + step % 2 for step in range(100)]}, "The loss does not fall"),
        ({"eval_losses": [1.9, 1.2, 1.4, 1.6]}, "The model overfits"),
        ({"num_cut_rows": 20}, "Rows are cut or left out"),
        ({"attempts": 2}, "The training was restarted"),
        ({"num_xids": 1}, "GPUs reported errors"),
        ({"clocks": (1830, 1410)}, "One GPU is slower than the others"),
        ({"throttled": {"throttled_hardware": 0, "throttled_thermal": 1}}, "GPUs were throttled"),
        ({"utilization": 40, "cpu": 97}, "GPUs wait for the CPU"),
        ({"utilization": 40}, "GPUs wait"),
        ({"memory": 35}, "GPU memory is left unused"),
        ({"lengths": {"10": 500, "1000": 500}}, "Much of a batch is padding"),
        ({"start_seconds": {"download": 30 * MINUTE, "data": 60, "model": 60}}, "The start takes long"),
        ({"eval_seconds": 5 * MINUTE}, "Evaluations take long"),
        ({"checkpoint_seconds": 2 * MINUTE}, "Checkpoints take long"),
    ],
)
def test_a_job_with_one_flaw_is_told_of_it_alone(tmp_path, changes, title):
    assert Job(**changes).advise(tmp_path) == [title]


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_losses": [1.9, 1.3]},  # two say nothing of a trend
        {"lengths": {"10": 500, "1000": 500}, "packing": "batch"},
        {"losses": [2.0, 2.0, 2.0]},  # too few to judge
        {"start_seconds": {"download": 4 * MINUTE}},
        {"throttled": {"throttled_power_cap": 1, "throttled_hardware": 0}},  # what a busy GPU is held at
    ],
)
def test_what_only_looks_like_a_flaw_is_passed_over(tmp_path, changes):
    assert Job(**changes).advise(tmp_path) == []


def test_the_advice_names_what_takes_longest_at_the_start(tmp_path):
    job = Job(start_seconds={"download": 10 * MINUTE, "data": 40 * MINUTE, "model": 60})
    (advice,) = find_advice(read_history(job.write(tmp_path / "metrics.jsonl")))
    assert "40 min of them with 'data'" in advice.evidence
    assert "pretokenized" in advice.change


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"per_device_train_batch_size": 4},
            "Raise per_device_train_batch_size (and lower gradient",
        ),
        ({"global_batch_size": 64}, "Give a per_device_train_batch_size that takes more of global_batch_size at once"),
    ],
)
def test_a_larger_batch_is_advised_by_the_settings_that_make_it(tmp_path, settings, words):
    job = Job(memory=35, settings=settings)
    (advice,) = find_advice(read_history(job.write(tmp_path / "metrics.jsonl")))
    assert advice.change.startswith(words)


def test_padding_is_expected_by_the_longest_row_of_a_random_batch():
    # Of two rows, each 10 or 30 tokens long, the longer has 10 in a quarter of the batches: 25 on average, 20 used.
    assert expect_padding({10: 1, 30: 1}, 2) == pytest.approx(1 - 20 / 25)
    assert expect_padding({10: 1, 30: 1}, 1) == pytest.approx(0)
    assert expect_padding({}, 4) == 0
