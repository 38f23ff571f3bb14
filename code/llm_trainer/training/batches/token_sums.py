# SPDX-License-Identifier: Apache-2.0
"""Means over supervised tokens, in whatever batches, sequences and ranks their rows came.

A mean of batches' means would depend on all three: a batch of few tokens would count as much as one of many.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

MEANS = ("loss", "mean_token_accuracy", "aux_loss")  # as TRL's trainers name them


def begin_sums(device: torch.device) -> torch.Tensor:
    """Return the sums over no token, in float64: supervised tokens, [MEANS], all tokens, batches without a number."""
    return torch.zeros(3 + len(MEANS), dtype=torch.float64, device=device)


@torch.no_grad()
def sum_batch(outputs: Any, all_tokens: torch.Tensor, skips_nan: bool) -> torch.Tensor:
    """Return the sums over a batch of this rank. `outputs` are a model's with TRL's output layer.

    With `skips_nan` the supervised tokens of a batch whose sums are not finite do not count. No GPU is waited for.
    """
    num_tokens = outputs.label_mask.sum()
    loss = -outputs.log_probs.sum(dtype=torch.float64)
    # The experts' loss is a batch's own, which counts by its tokens.
    aux_loss = 0 * num_tokens if outputs.aux_loss is None else outputs.aux_loss.double() * num_tokens
    sums = torch.stack([num_tokens.double(), loss, outputs.is_top1.sum().double(), aux_loss.double()])
    is_finite = sums.isfinite().all()
    counted = torch.where(is_finite, sums, 0.0) if skips_nan else sums
    return torch.cat([counted, torch.stack([all_tokens.double(), 1 - is_finite.double()])])


@dataclass(frozen=True)
class TokenMeans:
    """The means of MEANS over supervised tokens, nan without any, and the counts beside them."""

    means: dict[str, float]
    all_tokens: int
    lost_batches: int  # those whose loss was no finite number


def compute_means(accelerator: Accelerator, sums: torch.Tensor) -> TokenMeans:
    """Return the means over the tokens of all ranks. It waits for all of them. Every rank must call this."""
    num_tokens, *totals, all_tokens, lost_batches = accelerator.reduce(sums).tolist()
    means = (total / num_tokens if num_tokens else float("nan") for total in totals)
    return TokenMeans(dict(zip(MEANS, means, strict=True)), int(all_tokens), int(lost_batches))
