# SPDX-License-Identifier: Apache-2.0
"""Batches of an epoch and of an evaluation: all rows, each of them once, on any number of ranks."""

from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import Trainer

from llm_trainer.data.formats.examples import IGNORED


class WholeBatches(Trainer):
    """A trainer whose ranks fill their last batch with rows that count for nothing.

    Accelerate would fill it with the first rows, which would count twice. It goes before TRL's trainer among the bases.
    """

    sequences_a_row: int = 1  # of one that fills a batch

    def get_train_dataloader(self) -> Any:
        """Return the batches of an epoch: all rows, each of them once, on any number of ranks."""
        rows = self.train_dataset
        if isinstance(rows, Dataset) and self.args.world_size > 1 and not self.args.dataloader_drop_last:
            rows = fill_batches(rows, self.args.train_batch_size * self.args.world_size, self.sequences_a_row)
        sampler = self._get_train_sampler
        return self._get_dataloader(rows, "Training", self._train_batch_size, sampler, is_training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation: all rows, each of them once, on any number of ranks."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1 or self.args.dataloader_drop_last:
            rows = fill_batches(rows, self.args.eval_batch_size * self.args.world_size, self.sequences_a_row)
        return super().get_eval_dataloader(rows)


def fill_batches(rows: Dataset, batch_rows: int, num_sequences: int = 1) -> Dataset:
    """Return the rows, and after them as many without a label as fill the last batch of `batch_rows` rows.

    Each of these has `num_sequences` sequences of a token, as attention over none is no number.
    """
    token = next(label for label in rows[0]["labels"] if label != IGNORED)  # as the first may be a piece of an image
    blank: dict[str, Any] = {"input_ids": [token] * num_sequences, "labels": [IGNORED] * num_sequences}
    blank |= {"length": num_sequences, "seq_lengths": [1] * num_sequences, "row": 0, "desirable": False}
    blank |= {"margin": 0.0, "pictures": []}
    blank |= {"other_ids": [token], "other_labels": [IGNORED]}
    return fill_up(rows, batch_rows, {name: blank[name] for name in rows.column_names})


def fill_up(rows: Dataset, batch_rows: int, blank: dict[str, Any]) -> Dataset:
    """Return the rows, and after them a blank one as often as fills the last batch of `batch_rows` rows."""
    num_missing = -len(rows) % batch_rows
    if not num_missing:
        return rows
    return concatenate_datasets([rows, Dataset.from_list([blank] * num_missing, features=rows.features)])
