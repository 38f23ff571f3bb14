# SPDX-License-Identifier: Apache-2.0
"""The batches that a device has had in a run: those that take the most memory, and one that stands for all."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import numpy as np
from datasets import Dataset

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.memory.batch import Batch
from llm_trainer.training.resumable import ResumableMixin

NUM_LARGEST = 3  # those with the most tokens: which of them takes the most depends on its labels, too


@dataclass(frozen=True)
class RunBatches:
    """Batches of a run."""

    largest: tuple[Batch, ...]
    typical: Batch  # with the mean number of tokens, and of tokens with a label


def find_run_batches(trainer: ResumableMixin, first_step: int, scored_share: float) -> RunBatches | None:
    """Return the batches of this rank after `first_step`. None: they are not known, as those of a stream.

    `scored_share` of all tokens have a label.
    """
    rows = trainer.train_dataset
    if not (isinstance(rows, Dataset) and trainer.makes_batches_of_rows) or trainer.state.global_step <= first_step:
        return None
    steps = islice(list_steps(trainer), first_step, trainer.state.global_step)
    batches = [batch for step in steps for batch in step]
    lengths = measure_rows(rows)
    tokens = np.array([lengths[batch].sum() for batch in batches])
    largest = [batches[place] for place in np.argsort(-tokens)[:NUM_LARGEST]]
    typical = collate(trainer, batches[int(np.abs(tokens - tokens.mean()).argmin())])
    scored = round(scored_share * typical.num_tokens)
    return RunBatches(tuple(collate(trainer, batch) for batch in largest), replace(typical, num_scored=scored))


def list_steps(trainer: ResumableMixin) -> Iterator[list[list[int]]]:
    """Yield the batches of each step of this rank, as places of rows, without an end."""
    arguments = trainer.args
    for epoch in count():
        batches = cut_in_pieces([*trainer.order_rows(epoch)], arguments.train_batch_size)
        own = batches[arguments.process_index :: arguments.world_size]
        yield from cut_in_pieces(own, arguments.gradient_accumulation_steps)


def cut_in_pieces(values: list[Any], size: int) -> list[list[Any]]:
    """Return the values in lists of so many, the last one of what is left."""
    return [values[place : place + size] for place in range(0, len(values), size)]


def measure_rows(rows: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the tokens of each row, or of each sequence that rows were packed into."""
    if "length" in rows.column_names:
        return np.asarray(rows.with_format("numpy")["length"][:], dtype=np.int64)
    return np.array([sum(lengths) for lengths in rows["seq_lengths"]], dtype=np.int64)


def collate(trainer: ResumableMixin, places: list[int]) -> Batch:
    """Return the batch that the rows at these places make."""
    examples = [trainer.train_dataset[place] for place in places]
    made = trainer.data_collator(examples)
    num_sequences, length = made["input_ids"].shape
    num_rows = sum(len(example.get("seq_lengths", [0])) for example in examples)
    num_tokens = sum(len(example["input_ids"]) for example in examples)
    num_scored = int((made["labels"][:, 1:] != IGNORED).sum())
    is_shared = num_rows > num_sequences or num_tokens < num_sequences * length
    return Batch(num_sequences, length, num_scored, is_shared, RowImages.of(made))
