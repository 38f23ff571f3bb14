# SPDX-License-Identifier: Apache-2.0
"""The order of an epoch: the rows as a sampler orders them, and last those that only fill the last batch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class FilledOrder(Sampler[int]):
    """A sampler's order of the first rows of a data set, and after it all others.

    The order of the first rows does not depend on how many others there are, and so not on the number of ranks.
    """

    def __init__(self, order: Any, num_ordered: int, num_rows: int) -> None:
        """Take the sampler, the number of rows that it orders, and the number of all rows."""
        self.order, self.others = order, range(num_ordered, num_rows)

    def __iter__(self) -> Iterator[int]:
        """Yield the places of all rows."""
        yield from self.order
        yield from self.others

    def __len__(self) -> int:
        """Return the number of all rows."""
        return len(self.order) + len(self.others)
