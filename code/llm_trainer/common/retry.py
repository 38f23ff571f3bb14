# SPDX-License-Identifier: Apache-2.0
"""Waiting times between attempts at what fails for a while."""

from dataclasses import dataclass


@dataclass
class Backoff:
    """Waiting times in seconds: each is twice the one before, and none is longer than the longest."""

    first_seconds: float
    longest_seconds: float
    num_failures: int = 0  # since the last success

    def note_failure(self) -> float:
        """Count a failure, and return how long to wait before the next attempt."""
        self.num_failures += 1
        # The exponent is bounded, since a float of a tracker that is away for days would overflow.
        return min(self.first_seconds * 2.0 ** min(self.num_failures - 1, 64), self.longest_seconds)

    def note_success(self) -> None:
        """Begin anew with the shortest wait."""
        self.num_failures = 0
