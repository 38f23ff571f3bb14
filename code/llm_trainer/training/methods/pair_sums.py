# SPDX-License-Identifier: Apache-2.0
"""Means over pairs, in whatever batches and ranks they came. TRL's trainers take means of batches' means."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class PairSums:
    """The sums over pairs of metrics that are means of a batch, and the tokens that were read."""

    num_pairs: int = 0
    num_tokens: int = 0
    totals: tuple[tuple[str, float], ...] = ()  # metric -> sum over the pairs

    def add_batch(self, num_pairs: int, num_tokens: int, means: dict[str, float]) -> "PairSums":
        """Return the sums with those of a batch, whose metrics are means over its pairs."""
        before = dict(self.totals)
        totals = {name: before.get(name, 0.0) + mean * num_pairs for name, mean in means.items()}
        return PairSums(self.num_pairs + num_pairs, self.num_tokens + num_tokens, tuple((before | totals).items()))

    def __add__(self, other: "PairSums") -> "PairSums":
        """Return the sums over both."""
        totals = dict(self.totals)
        for name, total in other.totals:
            totals[name] = totals.get(name, 0.0) + total
        return PairSums(self.num_pairs + other.num_pairs, self.num_tokens + other.num_tokens, tuple(totals.items()))

    def gather(self, accelerator: Accelerator, names: tuple[str, ...]) -> "PairSums":
        """Return the sums of all ranks for the metrics of these names. Every rank must call this."""
        own = dict(self.totals)
        values = [self.num_pairs, self.num_tokens, *(own.get(name, 0.0) for name in names)]
        sums = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()
        return PairSums(int(sums[0]), int(sums[1]), tuple(zip(names, sums[2:], strict=True)))

    @property
    def means(self) -> dict[str, float]:
        """The means of the metrics over the pairs, nan without any."""
        return {name: total / self.num_pairs if self.num_pairs else float("nan") for name, total in self.totals}
