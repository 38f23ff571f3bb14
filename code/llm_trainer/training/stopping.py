# SPDX-License-Identifier: Apache-2.0
"""The request to stop a job, and how all ranks of all hosts come to stop after the same step.

SageMaker sends SIGTERM to PID 1 of every container, not at the same moment, and kills the containers 120 s later. PID 1
turns the signal into a file. Nothing between it and the workers can lose or delay a file. A signal would go through
torchrun, which kills its workers 30 s after a SIGTERM. This module serves workers that train. Before they do, PID 1
ends them by itself (job/start_gate.py).
"""

import math
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llm_trainer.job.rank_traces import STOP_GROUP

# A run that is given a time leaves this share of it for the last checkpoint and the export, but no more than this.
RESERVED_SHARE, RESERVED_SECONDS = 0.1, 60.0
SLOW_STEP_SECONDS = 1.0  # from here on a step costs more than the wait for all ranks' decision
RESERVED_CHECKPOINTS = 3  # at least as long as so many checkpoints took is left, too


class StopRequest:
    """A wish that the job stops: a signal to the launcher, or the clock."""

    def __init__(self, file: Path, started: float, max_run_seconds: int | None) -> None:
        """Watch `file`, and the clock where the run has a longest time. `started` is in seconds since the epoch."""
        self.file = file
        self.deadline = float("inf")
        if max_run_seconds is not None:
            self.deadline = started + max_run_seconds - min(RESERVED_SHARE * max_run_seconds, RESERVED_SECONDS)

    def is_made(self, checkpoint_seconds: float = 0.0) -> bool:
        """Tell whether the job shall stop. A last checkpoint of `checkpoint_seconds` has to fit into the time."""
        return self.file.exists() or time.time() > self.deadline - RESERVED_CHECKPOINTS * checkpoint_seconds

    def age_seconds(self) -> float:
        """Return the seconds since the signal, and 0 where the clock asks for the stop."""
        return time.time() - self.file.stat().st_ctime if self.file.exists() else 0.0


class StopConsensus:
    """The decision of all ranks to stop or to save, at the same step, by a sum of their wishes.

    The sum runs over gloo on the CPU while the next step computes, and is read one step later. Nobody waits for it, and
    no GPU is synchronized. Where steps are long, the wait is short beside a step, and the sum is read at once. Every
    rank must call `poll` equally often.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Make a gloo group of all ranks, where there are several. Every rank must call this.

        A rank is waited for as long as in the training itself: torch would give the group half an hour.
        """
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            timeout = timedelta(seconds=timeout_seconds)
            self.group = dist.new_group(backend="gloo", timeout=timeout, group_desc=STOP_GROUP)
        self.sums = torch.zeros(3, dtype=torch.int64)
        self.pending: dist.Work | None = None
        self.step_seconds = float("inf")  # the mean of all ranks, the same on each; not known yet

    def poll(self, stop: bool, save: bool, step_seconds: float) -> tuple[bool, bool]:
        """Return whether to stop and whether to save, the same on every rank, for this rank's wishes.

        `step_seconds` is the length of this rank's last step.
        """
        if self.group is None:
            self.step_seconds = step_seconds
            return stop, save
        agreed = self.finish()
        self.sums = torch.tensor([stop, save, round(1000 * step_seconds)], dtype=torch.int64)
        self.pending = dist.all_reduce(self.sums, group=self.group, async_op=True)
        if self.step_seconds > SLOW_STEP_SECONDS:
            agreed = self.finish()
            self.sums = torch.zeros_like(agreed)  # these wishes come true now, and not once more
        return bool(agreed[0]), bool(agreed[1])

    def finish(self) -> torch.Tensor:
        """Wait for the newest sum. Return it: [ranks that stop, that save, milliseconds of their last steps]."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
            self.step_seconds = int(self.sums[2]) / 1000 / dist.get_world_size(self.group)
        return self.sums

    def count_batches_between_polls(self, batches_a_step: int) -> int:
        """Return after how many batches of a step the ranks ask each other again: about once in SLOW_STEP_SECONDS.

        It is more than a step has where steps are short.
        """
        return max(1, math.ceil(batches_a_step * SLOW_STEP_SECONDS / max(self.step_seconds, 1e-3)))
