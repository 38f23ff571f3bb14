# SPDX-License-Identifier: Apache-2.0
"""Where the time of a job goes, phase by phase, from the container's start."""

import time


class Timeline:
    """Seconds that each phase took."""

    def __init__(self, started: float) -> None:
        self.started = self.last = started  # seconds since the epoch, since the start lies in another process
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """The phase ends now."""
        now = time.time()
        self.seconds[phase] = round(now - self.last, 2)
        self.last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds} s" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s after the start: {phases}"
