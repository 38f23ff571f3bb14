# SPDX-License-Identifier: Apache-2.0
"""A series of measurements that is thinned while it grows: as many points as a chart can show, no extreme lost."""

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple


class Bucket(NamedTuple):
    """Neighbouring points as one: their number, their mean place, and the range and mean of their values."""

    points: int
    x: float
    low: float
    mean: float
    high: float

    def join(self, other: "Bucket") -> "Bucket":
        """Return this bucket and another one as one."""
        points = self.points + other.points
        share = other.points / points
        return Bucket(
            points,
            self.x + (other.x - self.x) * share,
            min(self.low, other.low),
            self.mean + (other.mean - self.mean) * share,
            max(self.high, other.high),
        )


@dataclass
class Series:
    """Buckets of a growing number of points, at most `limit`, which is even. When full, two neighbours become one."""

    limit: int = 1000
    buckets: list[Bucket] = field(default_factory=list)
    points_a_bucket: int = 1
    last: float | None = None
    not_finite_at: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Append a point. A value that is not finite is only noted, if it is among the first hundred."""
        if not math.isfinite(y):
            if len(self.not_finite_at) < 100:
                self.not_finite_at.append(x)
            return
        self.last = y
        if self.buckets and self.buckets[-1].points < self.points_a_bucket:
            points, at, low, mean, high = self.buckets[-1]
            points += 1  # in place, since Bucket.join() takes twice as long, and a report adds a million points
            self.buckets[-1] = Bucket(
                points, at + (x - at) / points, min(low, y), mean + (y - mean) / points, max(high, y)
            )
            return
        if len(self.buckets) == self.limit:
            self.buckets = [left.join(right) for left, right in zip(self.buckets[::2], self.buckets[1::2], strict=True)]
            self.points_a_bucket *= 2
        self.buckets.append(Bucket(1, x, y, y, y))

    def drop_from(self, x: float) -> None:
        """Forget the buckets at `x` and behind it, because another attempt began there."""
        while self.buckets and self.buckets[-1].x >= x:
            self.buckets.pop()
            self.last = self.buckets[-1].mean if self.buckets else None

    def cut_out(self, start: float, end: float) -> "Series":
        """Return the buckets between two places, both included."""
        return Series(self.limit, [bucket for bucket in self.buckets if start <= bucket.x <= end])

    def scale(self, factor: float) -> "Series":
        """Return the series in another unit."""
        scaled = [Bucket(bucket.points, bucket.x, *(factor * value for value in bucket[2:])) for bucket in self.buckets]
        return Series(self.limit, scaled)

    def smooth(self) -> list[float]:
        """Return a running mean: for each bucket the mean of its neighbours, up to a fiftieth of all on either side."""
        num = len(self.buckets)
        reach = num // 50 + 1
        sums = list(accumulate((bucket.mean for bucket in self.buckets), initial=0.0))
        spans = [(max(0, place - reach), min(num, place + reach + 1)) for place in range(num)]
        return [(sums[end] - sums[start]) / (end - start) for start, end in spans]

    def __bool__(self) -> bool:
        return bool(self.buckets)

    @property
    def count(self) -> int:
        """Number of points."""
        return sum(bucket.points for bucket in self.buckets)

    @property
    def low(self) -> float:
        """Lowest value of all points."""
        return min(bucket.low for bucket in self.buckets)

    @property
    def high(self) -> float:
        """Highest value of all points."""
        return max(bucket.high for bucket in self.buckets)

    @property
    def mean(self) -> float:
        """Mean of all points' values."""
        return math.fsum(bucket.mean * bucket.points for bucket in self.buckets) / self.count
