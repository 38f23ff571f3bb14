# SPDX-License-Identifier: Apache-2.0
"""Batches of pairs: two answers to a prompt, the chosen and the rejected one, which a row holds end to end.

The answers share sequences like other rows, or are padded. TRL's losses read log-probabilities of padded answers, the
chosen ones first. So a batch tells where each of its trained tokens stands there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_trainer.data.formats.examples import IGNORED

PAIRS = "pairs"  # the key of a batch's `Pairs`
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")  # of the output layer, one a token

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Pairs:
    """The places of a batch's trained tokens among its answers, which stand one below the other, the chosen ones first.

    A place counts `num_slots` to an answer, one for each token that a token before it predicts.
    """

    places: torch.Tensor  # [trained tokens], in the order in which the model computes them
    rows: torch.Tensor  # [pairs], the numbers of the rows in their split
    num_answers: int
    num_slots: int
    num_tokens: int  # read by the model, with those of prompts
    is_blank: bool  # whether the pair only fills a rank's batch, and counts for nothing

    @property
    def num_pairs(self) -> int:
        """The pairs that count."""
        return 0 if self.is_blank else self.num_answers // 2

    def to(self, device: torch.device, **options: Any) -> "Pairs":
        """Return the pairs with their places on a device. Accelerate moves batches so."""
        return replace(self, places=self.places.to(device, **options), rows=self.rows.to(device, **options))

    def pin_memory(self) -> "Pairs":
        """Return the pairs with their places in pinned memory. PyTorch's loaders pin batches so."""
        return replace(self, places=self.places.pin_memory(), rows=self.rows.pin_memory())

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return the trained tokens' values [trained tokens] at their places [answers, slots], zero elsewhere."""
        spread = values.new_zeros(self.num_answers * self.num_slots)
        return spread.index_copy(0, self.places, values).view(self.num_answers, self.num_slots)

    def describe_answers(self) -> dict[str, torch.Tensor]:
        """Return the padded answers as TRL's losses ask for them: by masks [answers, slots + 1], and no token.

        The tokens of `attention_mask` are counted by TRL; they are counted elsewhere here.
        """
        is_trained = self.spread(torch.ones_like(self.places))
        mask = torch.nn.functional.pad(is_trained, (1, 0))
        return {"input_ids": torch.zeros_like(mask), "attention_mask": mask.new_zeros(1), "completion_mask": mask}


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of pairs out of rows. Another collator packs or pads their answers."""

    collate: Collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other collator, and its pairs. Rows that only fill the batch are left out."""
        trained = [example for example in examples if any(label != IGNORED for label in example["labels"])]
        kept = trained or examples[:1]
        answers = list_answers(kept)
        num_slots = max(len(ids) for ids, _ in answers) - 1
        # In place of labels stand numbers, by which each token is found again wherever the other collator puts it.
        numbered = [
            {"input_ids": ids, "labels": number_labels(labels, row * num_slots - 1)}
            for row, (ids, labels) in enumerate(answers)
        ]
        batch = self.collate(numbered)
        numbers = batch["labels"]
        batch["labels"] = torch.where(numbers == IGNORED, IGNORED, batch["input_ids"])
        places, num_tokens = numbers[numbers != IGNORED], sum(len(ids) for ids, _ in answers)
        rows = torch.tensor([example.get("row", 0) for example in kept])
        batch[PAIRS] = Pairs(places, rows, len(answers), num_slots, num_tokens if trained else 0, not trained)
        return batch


def list_answers(examples: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of the rows' sequences: all chosen answers, then all rejected ones."""
    chosen, rejected = [], []
    for example in examples:
        end, ids, labels = example["seq_lengths"][0], example["input_ids"], example["labels"]
        chosen.append((ids[:end], labels[:end]))
        rejected.append((ids[end:], labels[end:]))
    return chosen + rejected


def number_labels(labels: list[int], first: int) -> list[int]:
    """Return, for each label, the number of its place: `first` for the first. The first label is never predicted."""
    return [IGNORED if label == IGNORED or not place else first + place for place, label in enumerate(labels)]
