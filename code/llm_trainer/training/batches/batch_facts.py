# SPDX-License-Identifier: Apache-2.0
"""Facts about a batch that are found while it lies in the host's memory, so that nobody asks the GPU for them.

TRL's output layer asks the GPU how many tokens have a label, forward and backward. Transformers asks it whether rows
share a sequence, and whether a mask has padding. Each time the host waits until the GPU has done all its work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from trl.trainer import utils as trl_utils

from llm_trainer.data.formats.examples import IGNORED

PLACES, SHARED, PADDED = "label_places", "shares_sequences", "is_padded"
find_packed_rows, are_all_true = masking_utils.find_packed_sequence_indices, masking_utils.fast_all


@dataclass(frozen=True)
class BatchFacts:
    """The facts about a batch, None where they are not known."""

    places: torch.Tensor | None = None  # of the tokens that predict a label, in the sequences end to end; ascending
    shares_sequences: bool | None = None  # whether the positions of a sequence begin again within it
    is_padded: bool | None = None

    @classmethod
    def take(cls, batch: dict[str, Any]) -> "BatchFacts":
        """Take the facts out of a batch, which a model would not understand."""
        return cls(batch.pop(PLACES, None), batch.pop(SHARED, None), batch.pop(PADDED, None))


NOTHING = BatchFacts()
current = NOTHING  # of the batch that the model computes now


@dataclass(frozen=True)
class FindFacts:
    """A collator that adds to the batches of another one what it finds in them."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Return the batch and, after all others, its facts."""
        batch = self.collate(examples)
        labels = batch["labels"]
        has_label = torch.zeros_like(labels, dtype=torch.bool)
        has_label[:, :-1] = labels[:, 1:] != IGNORED
        facts: dict[str, Any] = {PLACES: has_label.flatten().nonzero().squeeze(1)}
        if "position_ids" in batch:
            facts[SHARED] = bool((batch["position_ids"].diff(dim=-1) != 1).any())
        if "attention_mask" in batch:
            facts[PADDED] = not batch["attention_mask"].all()
        return {**batch, **facts}


@contextmanager
def known(facts: BatchFacts) -> Iterator[None]:
    """Have TRL and Transformers use the facts about the batch that is computed in this context."""
    global current
    before, current = current, facts
    try:
        yield
    finally:
        current = before


def use_facts(backbone: nn.Module) -> None:
    """Have TRL's output layer and Transformers' masks use the facts. `backbone` is the model below the output layer.

    Neither has an option for it: three functions that they ask are replaced in this process.

    Where the places are known, the output layer gets the scored tokens alone, and takes all that it gets. Else it picks
    those with a label, on a CPU too. There TRL would score all, and the head of a small model is a third of its step.
    """
    trl_utils._use_triton = lambda device: current.places is None
    masking_utils.find_packed_sequence_indices = find_shared_sequences
    masking_utils.fast_all = is_without_padding
    backbone.register_forward_hook(select_scored)


def select_scored(backbone: nn.Module, inputs: Any, output: Any) -> Any:
    """Return the output of the model below the output layer, with the last hidden states of the scored tokens."""
    if current.places is not None:
        output.last_hidden_state = pick(output.last_hidden_state.flatten(0, 1), current.places)
    return output


def pick(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the values at these places as one sequence [1, places, ...]."""
    return values.index_select(0, places)[None]


def shift_labels(labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the labels [1, places] that the tokens at these places predict. `labels` are [sequences, slots]."""
    return pick(labels.flatten(), places + 1)


def find_shared_sequences(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return the number of each token's row in its sequence, None where no sequence has several: as Transformers."""
    if current.shares_sequences is None:
        return find_packed_rows(position_ids)
    if not current.shares_sequences:
        return None
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def is_without_padding(mask: torch.Tensor) -> bool:
    """Tell whether no token of a padding mask [sequences, slots] is left out: as Transformers, in a training."""
    return bool(are_all_true(mask)) if current.is_padded is None else not current.is_padded
