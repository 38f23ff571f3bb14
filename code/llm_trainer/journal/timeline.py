# SPDX-License-Identifier: Apache-2.0
"""The phases of a job and their seconds, without a gap, from the container's start.

The launcher's phases come first; a worker's timeline goes on where they ended.
"""

import json
import os
import time
from typing import Self

from llm_trainer.journal.journal import Journal


class Timeline:
    """Seconds that each phase took, in the order of the phases."""

    def __init__(self, started: float, journal: Journal | None = None, host: str = "") -> None:
        """Begin at `started`, in seconds since the epoch, as the start lies in another process."""
        self.started = self.last = started
        self.seconds: dict[str, float] = {}
        self.journal, self.host = journal or Journal(None), host

    @classmethod
    def continue_from_launcher(cls, journal: Journal, host: str) -> Self:
        """Return a timeline that begins with the launcher's phases, which the environment tells."""
        timeline = cls(float(os.environ["LLM_TRAINER_STARTED"]), journal, host)
        timeline.seconds = json.loads(os.environ["LLM_TRAINER_PHASES"])
        timeline.last += sum(timeline.seconds.values())
        return timeline

    def mark(self, phase: str) -> None:
        """Note that a phase ends now."""
        now = time.time()
        self.seconds[phase] = round(now - self.last, 2)
        self.last = now
        self.journal.write("phase", name=phase, seconds=self.seconds[phase], host=self.host)

    def __str__(self) -> str:
        """Return the seconds since the start, and those of each phase."""
        phases = ", ".join(f"{phase} {seconds} s" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s after the start: {phases}"
