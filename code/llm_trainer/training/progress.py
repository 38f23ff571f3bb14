# SPDX-License-Identifier: Apache-2.0
"""The progress of the training, for people: a line now and then in a log, a bar on a terminal.

Time and cost are extrapolated from the steps of this run. The first step does not count, as it also compiles and
allocates.
"""

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_trainer.common import log
from llm_trainer.common.ranks import rank
from llm_trainer.common.units import count_instance_hours

# Seconds between two lines: soon ones tell whether the job does what it should, later ones would only fill the log.
EARLY_SECONDS, LATER_SECONDS = 10.0, 60.0
EARLY_PHASE_SECONDS = 120.0
REDRAW_SECONDS = 0.2  # at least so long a bar stays as it is
HALF_A_DAY = 12 * 3600
NUM_INTERVALS = 1000  # the last so many steps tell how long one takes


class Progress(TrainerCallback):
    """A callback that shows the progress. Its trainer trains inside its context."""

    def __init__(self, started: float, num_hosts: int) -> None:
        """Begin for a job that started at `started`, in seconds since the epoch. `num_hosts` are billed."""
        self.started, self.num_hosts = started, num_hosts
        self.first_step, self.first_at = 0, 0.0
        self.shown_at = self.began_at = time.monotonic()
        self.step_intervals: deque[float] = deque(maxlen=NUM_INTERVALS)
        self.step_at = 0.0

    def __enter__(self) -> Self:
        """Begin to show the progress."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End to show the progress."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the progress where it is time for it."""
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        if self.step_at:
            self.step_intervals.append(now - self.step_at)
        self.step_at = now
        if not self.first_at:
            self.first_step, self.first_at = state.global_step, now
        elif now - self.shown_at >= self.find_interval(now):
            self.shown_at = now
            self.show(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the next step begin here."""
        self.step_at = time.monotonic() if self.step_at else 0.0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the next step begin here."""
        self.step_at = time.monotonic() if self.step_at else 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the end."""
        if state.is_world_process_zero:
            self.show(state, is_over=True)

    def find_interval(self, now: float) -> float:
        """Return the seconds that have to lie between two lines, at `time.monotonic()` = `now`."""
        return EARLY_SECONDS if now - self.began_at < EARLY_PHASE_SECONDS else LATER_SECONDS

    def show(self, state: TrainerState, is_over: bool = False) -> None:
        """Print a line."""
        percent = 100 * state.global_step // max(1, state.max_steps)
        text = "; ".join(self.describe(state, is_over))
        log.info(f"Progress: step {state.global_step} of {state.max_steps} ({percent} %); {text}")

    @property
    def step_seconds(self) -> float | None:
        """The mean seconds of a step, without the first, evaluations and checkpoints. None: there was one step.

        Steps differ with the tokens of their batches, so that their median tells nothing about their sum.
        """
        return statistics.mean(self.step_intervals) if self.step_intervals else None

    def describe(self, state: TrainerState, is_over: bool) -> Iterator[str]:
        """Yield the time of a step, the time that is left, and the cost, as far as they are known."""
        steps, left = state.global_step - self.first_step, 0.0
        if steps and self.first_at:
            seconds_a_step = (time.monotonic() - self.first_at) / steps
            left = 0.0 if is_over else seconds_a_step * (state.max_steps - state.global_step)
            yield f"{seconds_a_step:.2g} s a step"
        hours = f"{self.count_instance_hours():.2f}"
        if not left:
            yield f"{hours} instance-hours so far"
            return
        day = "%H:%M UTC" if left < HALF_A_DAY else "%d %b %H:%M UTC"
        yield f"{show_seconds(left)} left, until {time.strftime(day, time.gmtime(time.time() + left))}"
        yield f"{hours} of about {self.count_instance_hours(left):.2f} instance-hours"

    def count_instance_hours(self, more_seconds: float = 0.0) -> float:
        """Return the instance-hours that are billed so far, and for so many seconds more."""
        return count_instance_hours(self.num_hosts, self.started, time.time() + more_seconds)


class ProgressBar(Progress):
    """A bar and a line of text on a terminal, which stay below everything that is printed."""

    def __enter__(self) -> Self:
        """Take over the terminal's last lines."""
        from rich.console import Console
        from rich.live import Live

        # The terminal wraps what is printed, and lines can be copied whole.
        console = Console(file=log.find_terminal(), soft_wrap=True, highlight=False, markup=False, emoji=False)
        self.live = Live(console=console, auto_refresh=False)  # a thread for it would slow the training
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the terminal's last lines back."""
        self.live.stop()

    def find_interval(self, now: float) -> float:
        """Return the seconds that have to lie between two states of the bar."""
        return REDRAW_SECONDS

    def show(self, state: TrainerState, is_over: bool = False) -> None:
        """Draw the bar anew."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Column, Table
        from rich.text import Text

        share = f"{100 * state.global_step // max(1, state.max_steps)} %"
        row = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
        bar = Bar(total=state.max_steps, completed=state.global_step)
        row.add_row(f"step {state.global_step} of {state.max_steps}", bar, share)
        text = Text("; ".join(self.describe(state, is_over)), no_wrap=True, overflow="ellipsis")
        self.live.update(Group(row, text), refresh=True)


def choose_progress(started: float, num_hosts: int) -> Progress:
    """Return a bar where a person looks at rank 0's terminal, else lines in the log."""
    on_terminal = rank() == 0 and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return (ProgressBar if on_terminal else Progress)(started, num_hosts)


def show_seconds(seconds: float) -> str:
    """Return a duration for people, such as 45 s, 9 min 50 s or 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
