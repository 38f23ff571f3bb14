# SPDX-License-Identifier: Apache-2.0
"""Prints the training's metrics, one line a set, while it runs."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_trainer.metric_definitions import LEFT_OUT, RENAMED, format_line
from llm_trainer.timeline import Timeline


class MetricLines(TrainerCallback):
    """Prints every set of metrics on one flushed line with the speed since the last, and how long the start took."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.last_seconds = 0.0
        self.last_tokens = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last_seconds = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and "first_step" not in self.timeline.seconds:
            self.timeline.mark("first_step")
            print(f"First step done {self.timeline}", flush=True)

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
        metrics = {RENAMED.get(key, key): value for key, value in logs.items() if key not in LEFT_OUT}
        metrics |= {"step": state.global_step, "total_steps": state.max_steps}
        if "loss" in logs and "num_tokens" in logs:
            metrics["tokens_per_second"] = self.measure_speed(logs["num_tokens"])
        print(format_line(metrics), flush=True)

    def measure_speed(self, num_tokens: float) -> float:
        """Tokens a second over all ranks since the last training line."""
        now = time.monotonic()
        speed = (num_tokens - self.last_tokens) / max(now - self.last_seconds, 1e-9)
        self.last_seconds, self.last_tokens = now, num_tokens
        return speed
