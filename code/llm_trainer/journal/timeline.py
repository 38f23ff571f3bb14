# SPDX-License-Identifier: Apache-2.0
"""Where the time of a job goes, phase by phase without a gap, from the container's start.

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
        self.started = self.last = started  # seconds since the epoch, since the start lies in another process
        self.seconds: dict[str, float] = {}
        self.journal, self.host = journal or Journal(None), host

    @classmethod
    def go_on(cls, journal: Journal, host: str) -> Self:
        """The launcher's, as it was when it started the workers."""
        timeline = cls(float(os.environ["LLM_TRAINER_STARTED"]), journal, host)
        timeline.seconds = json.loads(os.environ["LLM_TRAINER_PHASES"])
        timeline.last += sum(timeline.seconds.values())
        return timeline

    def mark(self, phase: str) -> None:
        """The phase ends now."""
        now = time.time()
        self.seconds[phase] = round(now - self.last, 2)
        self.last = now
        self.journal.write("phase", name=phase, seconds=self.seconds[phase], host=self.host)

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds} s" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s after the start: {phases}"
