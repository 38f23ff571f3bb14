# SPDX-License-Identifier: Apache-2.0
"""A stop signal to the launcher, turned into a file that the workers look for after each step.

As PID 1 the launcher has no default handlers: without these a stop would be ignored until SIGKILL. The signal is not
passed on, since torchrun would kill the workers 30 s after it.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from llm_trainer.common import log

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE_OF_SIGNAL = 128  # plus the signal's number: how shells tell the exit code of a process that a signal ended

early_signals: list[int] = []  # those that came before anything could be done about them


def note_early_stops() -> None:
    """Note stop signals from now on, for whoever asks `find_early_stop`.

    The first statement of the process: imports take a second and more, and PID 1 has no handlers of its own.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda number, frame: early_signals.append(number))


def find_early_stop() -> signal.Signals | None:
    """Return the first stop signal that `note_early_stops` noted, None where there was none."""
    return signal.Signals(early_signals[0]) if early_signals else None


def end_on_stops() -> None:
    """Have a stop signal end this process with an exit code that tells it, one that has come already too.

    Raises SystemExit in the main thread.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_CODE_OF_SIGNAL + signum)

    for signum in STOP_SIGNALS:
        signal.signal(signum, end)
    if early := find_early_stop():
        end(early, None)


@contextmanager
def withhold_stops() -> Iterator[None]:
    """Start processes in this block that no stop signal reaches, nor what they start themselves.

    Slurm sends its signal to every process of a job. It would end torchrun, and the processes that load data.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which a new process takes over
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class StopSignal:
    """SIGTERM and SIGINT to this process while the block runs; the first one creates `file`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.received_at: float | None = None  # seconds since the epoch

    def __enter__(self) -> Self:
        """Install the handlers."""
        self.previous = {signum: signal.signal(signum, self.receive) for signum in STOP_SIGNALS}
        if early := find_early_stop():
            self.receive(early, None)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back to who handled them before."""
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Create the file and say so. Later signals change nothing."""
        if self.received_at is None:
            self.received_at = time.time()
            self.file.touch()
            # Written past the log's stream: the signal may have come while that was writing.
            text = f"Received {signal.Signals(signum).name}: after this step, save a checkpoint, export and end.\n"
            os.write(sys.stdout.fileno(), text.encode())

    def log_end(self) -> None:
        """Log how long after a signal all processes had ended."""
        if self.received_at is not None:
            log.info(f"All processes ended {time.time() - self.received_at:.1f} s after the signal.")
