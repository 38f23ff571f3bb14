# SPDX-License-Identifier: Apache-2.0
"""Padding taken away from a batch and put back, as flash-attn's module of this name does it."""

import torch
from torch.nn import functional


def unpad_input(hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tokens of [batch, length, ...] that the mask holds, their places and the rows' bounds and lengths."""
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    places = mask.flatten().nonzero().flatten()
    bounds = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[places], places, bounds, int(lengths.max()), lengths


def pad_input(hidden: torch.Tensor, places: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Return [batch, length, ...] with the tokens at their places and zeros elsewhere."""
    padded = hidden.new_zeros(batch * length, *hidden.shape[1:])
    return padded.index_put((places,), hidden).unflatten(0, (batch, length))
