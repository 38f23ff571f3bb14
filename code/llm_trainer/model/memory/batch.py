# SPDX-License-Identifier: Apache-2.0
"""The batch of a device, as far as the memory and the time of a step depend on it."""

from dataclasses import dataclass

from llm_trainer.data.images.row_images import RowImages


@dataclass(frozen=True)
class Batch:
    """A batch as a collator makes it, or the largest that may come."""

    num_sequences: int
    length: int  # tokens of a sequence, with its padding
    num_scored: int | None = None  # tokens that predict a label; None: all, as each may
    shares_sequences: bool = True  # whether a sequence may have several rows, or padding
    images: RowImages | None = None  # of its rows; None without

    @property
    def num_tokens(self) -> int:
        """The tokens of all sequences, with their padding."""
        return self.num_sequences * self.length

    def find_num_scored(self) -> int:
        """Return the tokens that predict a label, or of those that may."""
        return self.num_tokens if self.num_scored is None else self.num_scored
