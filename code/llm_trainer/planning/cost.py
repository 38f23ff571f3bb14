# SPDX-License-Identifier: Apache-2.0
"""The dollars of a job, on demand and on spot instances, which AWS may take away."""

from dataclasses import dataclass

# AWS publishes how often spot instances are interrupted in a month, in classes up to `over 20 %` (EC2 Spot Instance
# advisor). GPU types are mostly in that class. Twice its bound is taken, as it has none above.
INTERRUPTIONS_A_MONTH = 0.4
HOURS_A_MONTH = 730


@dataclass(frozen=True)
class SpotRun:
    """A job on spot instances: the hours that it is billed for, those of lost work and of starts among them."""

    interruptions: float  # how many are to be expected
    hours: float


def expect_interruptions(hours: float, start_hours: float, between_hours: float, count: int) -> SpotRun:
    """Return what to expect of a job that takes so many hours on so many spot instances.

    With one instance all others stop. An interruption costs half of the work between two checkpoints, and the start.
    """
    rate = INTERRUPTIONS_A_MONTH / HOURS_A_MONTH * count
    lost = between_hours / 2 + start_hours
    expected = rate * hours / max(0.1, 1 - rate * lost)
    return SpotRun(expected, hours + expected * lost)
