# SPDX-License-Identifier: Apache-2.0
"""Batches of answers: a row holds one sequence or several end to end, each of them an answer with its prompt.

The answers share sequences like other rows, or are padded. TRL's losses read log-probabilities of padded answers, the
first of all rows first. So a batch tells where each of its trained tokens stands there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.row_images import split_row

ANSWERS = "answers"  # the key of a batch's `Answers`
DESIRABLE, MISMATCHED = "desirable", "mismatched"  # keys of a batch of KTO
NO_INPUTS = frozenset({ANSWERS, DESIRABLE, MISMATCHED, "num_tokens"})  # parts of a batch that no model takes
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")  # of the output layer, one a token

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class BatchPart:
    """A part of a batch that holds tensors. Its classes are frozen dataclasses."""

    def to(self, device: torch.device, **options: Any) -> Self:
        """Return the part with its tensors on a device. Accelerate moves batches so."""
        return self.replace_tensors(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Self:
        """Return the part with its tensors in pinned memory. PyTorch's loaders pin batches so."""
        return self.replace_tensors(torch.Tensor.pin_memory)

    def replace_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Return the part with its tensors changed."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})  # type: ignore[type-var]


@dataclass(frozen=True)
class Answers(BatchPart):
    """The places of a batch's trained tokens among its answers, which stand one below the other.

    The first answers of all rows come first, then the second ones.

    A place counts `num_slots` to an answer, one for each token that a token before it predicts.
    """

    places: torch.Tensor  # [trained tokens], in the order in which the model computes them
    rows: torch.Tensor  # [rows], their numbers in the split
    num_answers: int
    num_slots: int
    num_tokens: int  # read by the model, with those of prompts
    is_blank: bool  # whether the row only fills a rank's batch, and counts for nothing

    @property
    def num_rows(self) -> int:
        """The rows that count."""
        return 0 if self.is_blank else len(self.rows)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return the trained tokens' values [trained tokens] at their places [answers, slots], zero elsewhere."""
        spread = values.new_zeros(self.num_answers * self.num_slots)
        return spread.index_copy(0, self.places, values).view(self.num_answers, self.num_slots)

    def describe(self) -> dict[str, torch.Tensor]:
        """Return the padded answers as TRL's losses ask for them: by masks [answers, slots + 1], and no token.

        The tokens of `attention_mask` are counted by TRL; they are counted elsewhere here.
        """
        is_trained = self.spread(torch.ones_like(self.places))
        mask = torch.nn.functional.pad(is_trained, (1, 0))
        return {"input_ids": torch.zeros_like(mask), "attention_mask": mask.new_zeros(1), "completion_mask": mask}


@dataclass(frozen=True)
class AnswerCollator:
    """Makes a batch of answers out of rows. Another collator packs or pads them."""

    collate: Collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other collator, and its answers. Rows that only fill the batch are left out."""
        kept = keep_trained(examples)
        is_blank = not is_trained(kept[0])
        answers = list_answers(kept)
        num_slots = max(len(answer["input_ids"]) for answer in answers) - 1
        # In place of labels stand numbers, by which each token is found again wherever the other collator puts it.
        numbered = [
            {**answer, "labels": number_labels(answer["labels"], row * num_slots - 1)}
            for row, answer in enumerate(answers)
        ]
        batch = self.collate(numbered)
        numbers = batch["labels"]
        batch["labels"] = torch.where(numbers == IGNORED, IGNORED, batch["input_ids"])
        places, num_tokens = numbers[numbers != IGNORED], sum(len(answer["input_ids"]) for answer in answers)
        rows = torch.tensor([example.get("row", 0) for example in kept])
        batch[ANSWERS] = Answers(places, rows, len(answers), num_slots, 0 if is_blank else num_tokens, is_blank)
        return batch


def is_trained(example: dict[str, Any]) -> bool:
    """Tell whether any token of a row is trained on."""
    return any(label != IGNORED for label in example["labels"])


def keep_trained(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without those that only fill the batch; one of these where there are no others."""
    return list(filter(is_trained, examples)) or examples[:1]


def list_answers(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows' sequences, each as a row: the first of each row, then the second of each."""
    return [answer for place in zip(*map(split_row, examples), strict=True) for answer in place]


def number_labels(labels: list[int], first: int) -> list[int]:
    """Return, for each label, the number of its place: `first` for the first. The first label is never predicted."""
    return [IGNORED if label == IGNORED or not place else first + place for place, label in enumerate(labels)]
