# SPDX-License-Identifier: Apache-2.0
"""The place of a process among the workers, and work that one process of a host does for all."""

import os
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.1


def rank() -> int:
    """Return this process's number among all workers, from 0."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's number among the workers of its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Return the number of all workers."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return the number of workers on each host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def describe_rank(number: int) -> str:
    """Return a rank's name for messages, with its host where there are several."""
    host = os.environ.get("LLM_TRAINER_HOST")
    return f"Rank {number} on host {host}" if host else f"Rank {number}"


def run_on_local_rank_zero(done: Path, work: Callable[[], None]) -> None:
    """Let the host's first worker do the work while the others wait for it to create the file `done`.

    A file is used and not a collective, since tokenizing terabytes must not run into NCCL's time-out. If the first
    worker fails, torchrun ends the waiting ones.
    """
    if local_rank() == 0 and not done.exists():  # the file exists after a restart in place
        work()
        done.touch()
    while not done.exists():
        time.sleep(POLL_SECONDS)
