# SPDX-License-Identifier: Apache-2.0
"""A trainer of answers: the rows that it takes, and a batch's share of a step."""

from typing import Any

import torch
from datasets import Dataset

from llm_trainer.model.lora import find_base_model
from llm_trainer.training.batches.batch_facts import FindFacts, use_facts
from llm_trainer.training.batches.whole_batches import WholeBatches
from llm_trainer.training.methods.answers import ANSWERS


class AnswerRows(WholeBatches):
    """A trainer of TRL whose rows hold answers. It goes before TRL's trainer among the bases."""

    columns: tuple[str, ...]  # of a row
    data_collator: Any
    _signature_columns: Any  # a list, or None at first

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """Return the rows as they are, since they are tokenized already."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of a row, which TRL knows by other names, and its images, which the collator opens."""
        self._signature_columns = self._signature_columns or [*self.columns, "pictures"]
        super()._set_signature_columns_if_needed()

    def use_batch_facts(self) -> None:
        """Have batches bring facts that their own rank finds."""
        use_facts(find_base_model(self.model).base_model)
        if not self.args.torch_compile:  # which would compile anew for each number of labels
            self.data_collator = FindFacts(self.data_collator)

    def count_items(self, batch: dict[str, Any]) -> int:
        """Return the rows of a batch, over which the loss is a mean."""
        num_rows: int = batch[ANSWERS].num_rows
        return num_rows

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Return the rows of a step on all ranks, or whatever the loss is a mean over."""
        own = torch.tensor(sum(map(self.count_items, batch_samples)), device=device)
        return self.accelerator.reduce(own)

    def scale_loss(self, loss: torch.Tensor, num_own: int, num_items: torch.Tensor | None) -> torch.Tensor:
        """Return a batch's share of the step's mean, as DDP takes the mean of ranks; the mean itself in evaluations.

        `num_own` of the step's `num_items` are in the batch.
        """
        return loss if num_items is None else loss * (num_own * self.args.world_size / num_items)
