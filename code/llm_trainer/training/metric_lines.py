# SPDX-License-Identifier: Apache-2.0
"""The training's metrics while it runs, one line a set, in the log and in the journal.

Nothing here asks a GPU for a value: what is shown has been fetched for TRL's own sums, or is counted by the host.
"""

import time
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llm_trainer.common import log
from llm_trainer.common.metric_definitions import format_line
from llm_trainer.common.units import GIB
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.memory.peak import Peak
from llm_trainer.training.methods import TrainingMethod
from llm_trainer.training.resumable import ResumableMixin

LINES_A_RUN = 10  # at least, where the settings name no interval


@dataclass
class Lap:
    """The place of the training when the last line was shown."""

    at: float  # time.monotonic(), later by the seconds of evaluations and checkpoints since
    step: int
    tokens: float  # of all devices


class MetricLines(TrainerCallback):
    """Shows every set of metrics with the speed since the last one, and how long the start of the job took."""

    def __init__(
        self,
        trainer: ResumableMixin,
        method: TrainingMethod,
        timeline: Timeline,
        peak: Peak,
        peak_tokens_per_second: float | None,
    ) -> None:
        """Follow the trainer. `peak_tokens_per_second` is a device's at its peak, where that is known."""
        self.trainer, self.method, self.timeline, self.peak = trainer, method, timeline, peak
        self.peak_tokens_per_second = peak_tokens_per_second
        self.lap = Lap(time.monotonic(), 0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure from here, which may be the middle of a run. A short run is logged more often than a long one."""
        self.lap = Lap(time.monotonic(), state.global_step, self.trainer.num_tokens)
        if not self.trainer.run.has_logging_interval:
            state.logging_steps = min(state.logging_steps, max(1, state.max_steps // LINES_A_RUN))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show once how long everything before the first step took, and that step. Have the last step logged."""
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        if state.is_world_process_zero and "first_step" not in self.timeline.seconds:
            self.timeline.mark("first_step")
            log.info(f"First step done {self.timeline}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the seconds of a checkpoint out of the speed."""
        self.lap.at += self.trainer.checkpoint_seconds

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a set of metrics. The totals at the end are left out, as the manifest holds them."""
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # per step it is "loss"
            return
        names, hidden = self.method.metric_names, self.method.hidden_metrics
        values = {names.get(key, key): value for key, value in logs.items() if key.removeprefix("eval_") not in hidden}
        if "loss" in logs and "num_tokens" in logs:
            values |= self.measure_speed(state.global_step, logs["num_tokens"], args.world_size)
        self.lap.at += logs.get("eval_runtime", 0.0)
        steps = {"step": state.global_step, "total_steps": state.max_steps}
        log.metric_line(format_line(values | steps))
        epoch = values.pop("epoch", state.epoch)
        self.timeline.journal.write("metrics", **steps, epoch=epoch, values=values)

    def measure_speed(self, step: int, num_tokens: float, world_size: int) -> dict[str, float]:
        """Return the speed of all ranks since the last training line, and the memory that this rank took."""
        now, lap = time.monotonic(), self.lap
        seconds = max(now - lap.at, 1e-9)
        speed = (num_tokens - lap.tokens) / seconds
        self.lap = Lap(now, step, num_tokens)
        peak = self.peak_tokens_per_second
        return {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / world_size,
            "seconds_per_step": seconds / max(1, step - lap.step),
            **({"mfu": speed / world_size / peak} if peak else {}),
            "memory_gib": self.peak.read_bytes() / GIB,
        }
