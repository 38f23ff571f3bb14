# SPDX-License-Identifier: Apache-2.0
"""Work after the training that a job can do without, and that a stop breaks off at once.

The weights are in place by then. SageMaker kills a job 120 s after its signal, and a comparison, a merge or a push may
take longer. A thread looks for the signal's file, and interrupts the main thread, whatever library is at work there.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self, TypeVar

from llm_trainer.common import log

INTERRUPT = signal.SIGUSR1  # of this process to itself
POLL_SECONDS = 0.1
STUCK_SECONDS = 20.0  # work that goes on for so long after its interruption hangs in a library's own code

Done = TypeVar("Done")


class Interruption(BaseException):
    """A stop that comes while dispensable work is done. It is no Exception: nobody may take it for an error."""


class StopWatch:
    """A watch over the work after the training, for as long as the block runs in the main thread."""

    def __init__(self, file: Path, is_stopped: bool) -> None:
        """Look for a signal's file. `is_stopped` tells that the training was stopped already."""
        self.file = file
        self.was_stopped = is_stopped
        self.left_out: list[str] = []  # sentences
        self.is_open = False  # an interruption may come now
        self.is_idle = threading.Event()  # no work is done that could be broken off
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self.previous = signal.signal(INTERRUPT, self.interrupt)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the watch."""
        self.ended.set()
        self.thread.join()
        signal.signal(INTERRUPT, self.previous)

    @property
    def is_stopped(self) -> bool:
        """A stop has come, in the training or since."""
        return self.was_stopped or self.file.exists()

    def attempt(self, what: str, work: Callable[[], Done]) -> Done | None:
        """Return what the work returns. After a stop it is not begun, or broken off: the log says so, and None comes.

        `what` names the work at the end of a sentence. The work has to leave everything usable where it is cut.
        """
        self.is_idle.clear()
        try:
            try:
                self.is_open = True
                if not self.is_stopped:
                    return work()
            finally:
                self.is_open = False
        except Interruption:  # caught out here, because it may come between the work and its `finally`
            pass
        finally:
            self.is_idle.set()
        self.leave_out(what)
        return None

    def leave_out(self, what: str) -> None:
        """Note work that is left out, in the log and for the manifest."""
        self.left_out.append(f"Left out, since the job was stopped: {what}.")
        log.warning(self.left_out[-1])

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Break off the work of the main thread, once. Raises Interruption there."""
        if self.is_open:
            self.is_open = False
            raise Interruption

    def watch(self) -> None:
        """Interrupt the main thread when a stop comes in the middle of work. End the process where that does not help.

        Only work that began before the stop needs that: `attempt` begins none after it.
        """
        main = threading.main_thread().ident
        assert main is not None
        while not self.ended.wait(POLL_SECONDS):
            if self.is_open and self.is_stopped:
                signal.pthread_kill(main, INTERRUPT)
                if not self.is_idle.wait(STUCK_SECONDS):
                    log.warning("the job was stopped, and its work cannot be broken off: the result is in place.")
                    os._exit(0)
                return
