# SPDX-License-Identifier: Apache-2.0
"""Prints the training's metrics, one line a set, while it runs, and enters them in the journal.

Nothing here asks a GPU for a value: what is printed has been fetched for TRL's own sums, or is counted by the host.
"""

import time
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_trainer.common.units import GIB
from llm_trainer.journal.journal import Journal
from llm_trainer.journal.metric_definitions import LEFT_OUT, RENAMED, format_line
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.memory.peak import Peak
from llm_trainer.training.resumable_trainer import ResumableTrainer


@dataclass
class Lap:
    """Where the training was when the last line was printed."""

    at: float  # time.monotonic(), later by what evaluations and checkpoints have taken since
    step: int
    tokens: float  # of all devices


class MetricLines(TrainerCallback):
    """Prints every set of metrics on one flushed line with the speed since the last, and how long the start took."""

    def __init__(
        self, trainer: ResumableTrainer, timeline: Timeline, journal: Journal, peak: Peak, full_speed: float | None
    ) -> None:
        """`full_speed` is the tokens a second of a device at its peak, where that is known."""
        self.trainer, self.timeline, self.journal, self.peak = trainer, timeline, journal, peak
        self.full_speed = full_speed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.lap = Lap(time.monotonic(), state.global_step, self.trainer.num_tokens)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and "first_step" not in self.timeline.seconds:
            self.timeline.mark("first_step")
            print(f"First step done {self.timeline}", flush=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.lap.at += self.trainer.checkpoint_seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return  # the totals at the end are in the manifest
        values = {RENAMED.get(key, key): value for key, value in logs.items() if key not in LEFT_OUT}
        if "loss" in logs and "num_tokens" in logs:
            values |= self.measure_speed(state.global_step, logs["num_tokens"], args.world_size)
        self.lap.at += logs.get("eval_runtime", 0.0)
        steps = {"step": state.global_step, "total_steps": state.max_steps}
        print(format_line(values | steps), flush=True)
        epoch = values.pop("epoch", state.epoch)
        self.journal.write("metrics", **steps, epoch=epoch, values=values)

    def measure_speed(self, step: int, num_tokens: float, world_size: int) -> dict[str, float]:
        """The speed of all ranks together since the last training line, and the memory that this one took."""
        now, lap = time.monotonic(), self.lap
        seconds = max(now - lap.at, 1e-9)
        speed = (num_tokens - lap.tokens) / seconds
        self.lap = Lap(now, step, num_tokens)
        return {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / world_size,
            "seconds_per_step": seconds / max(1, step - lap.step),
            **({"mfu": speed / world_size / self.full_speed} if self.full_speed else {}),
            "memory_gib": self.peak.read_bytes() / GIB,
        }
