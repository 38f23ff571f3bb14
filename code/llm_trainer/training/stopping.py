# SPDX-License-Identifier: Apache-2.0
"""How a job is asked to stop, and how all ranks of all hosts come to stop after the same step.

SageMaker sends SIGTERM to PID 1 of every container, not at the same moment, and kills 120 s later. PID 1 turns the
signal into a file, which nothing between it and the workers can lose, delay or follow with a kill of its own: torchrun
kills its workers 30 s after a SIGTERM. Here is what happens once they train; before, PID 1 ends them (gate.py).
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist

# A run that is given a time leaves this share of it for the last checkpoint and the export, but no more than this.
RESERVED_SHARE, RESERVED_SECONDS = 0.1, 60.0
RESERVED_CHECKPOINTS = 3  # and at least as long as this many checkpoints took
SLOW_STEP_SECONDS = 1.0


class StopRequest:
    """Whether somebody wants this job to stop: a signal to the launcher, or the clock."""

    def __init__(self, file: Path, started: float, max_run_seconds: int | None) -> None:
        self.file = file
        self.deadline = float("inf")
        if max_run_seconds is not None:
            self.deadline = started + max_run_seconds - min(RESERVED_SHARE * max_run_seconds, RESERVED_SECONDS)

    def is_made(self, checkpoint_seconds: float = 0.0) -> bool:
        """`checkpoint_seconds` is what a checkpoint takes: a last one has to fit in before the time is over."""
        return self.file.exists() or time.time() > self.deadline - RESERVED_CHECKPOINTS * checkpoint_seconds

    def age_seconds(self) -> float:
        """Seconds since the signal, 0 where it was the clock."""
        return time.time() - self.file.stat().st_ctime if self.file.exists() else 0.0


class Agreement:
    """Makes what one rank wishes the decision of all, at the same step, by a sum of the wishes over all ranks.

    The sum runs over gloo on the CPU while the next step computes and is read one step later: nobody waits and no GPU
    is synchronized. Where steps are long the wait is nothing and a step is much, and it is read at once. Every rank
    must call `reach` equally often.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.sums = torch.zeros(3, dtype=torch.int32)
        self.pending: dist.Work | None = None

    def reach(self, stop: bool, save: bool, slow: bool) -> tuple[bool, bool]:
        """(whether to stop, whether to save), the same on every rank; `slow` says that this rank's steps are long."""
        if self.group is None:
            return stop, save
        was_slow = self.settle()[2]
        agreed = self.sums
        self.sums = torch.tensor([stop, save, slow], dtype=torch.int32)
        self.pending = dist.all_reduce(self.sums, group=self.group, async_op=True)
        if was_slow:
            self.settle()
            agreed = self.sums
        return bool(agreed[0]), bool(agreed[1])

    def settle(self) -> torch.Tensor:
        """The newest sum, once it is there."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        return self.sums
