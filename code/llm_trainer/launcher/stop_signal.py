# SPDX-License-Identifier: Apache-2.0
"""A stop signal to the launcher, turned into a file that the workers look for."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


class StopSignal:
    """SIGTERM and SIGINT to this process, turned into a file that the workers look for after each step.

    As PID 1 this process has no default handlers: without ours a stop would be ignored until SIGKILL. The signal is not
    passed on: torchrun would kill the workers 30 s after it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked_at: float | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {signum: signal.signal(signum, self.receive) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.asked_at is None:
            self.asked_at = time.time()
            self.file.touch()
            # Not print: the signal may have come in the middle of one.
            text = f"Received {signal.Signals(signum).name}: after this step, save a checkpoint, export and end.\n"
            os.write(sys.stdout.fileno(), text.encode())

    def describe_end(self) -> None:
        if self.asked_at is not None:
            print(f"All processes ended {time.time() - self.asked_at:.1f} s after the signal.", flush=True)
