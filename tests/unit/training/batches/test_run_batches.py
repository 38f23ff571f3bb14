# SPDX-License-Identifier: Apache-2.0
"""The batches of a run are those that its sampler and its collator make, in the order of its seed."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import RandomSampler

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.memory.batch import Batch
from llm_trainer.training.batches.run_batches import find_run_batches, list_steps
from llm_trainer.training.packing import PackingCollator

LENGTHS = (10, 20, 30, 40, 50)


def build_trainer(steps, **arguments):
    """What the batches are found by: rows of known lengths, the latter half of each with labels."""
    rows = [{"input_ids": [1] * each, "labels": [IGNORED] * (each // 2) + [1] * (each // 2)} for each in LENGTHS]
    rows = Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])
    generator = torch.Generator()

    def order_rows(epoch):
        generator.manual_seed(7 + epoch)
        return iter(RandomSampler(rows, generator=generator))

    given = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1, "process_index": 0, **arguments}
    return SimpleNamespace(
        train_dataset=rows,
        makes_batches_of_rows=True,
        data_collator=PackingCollator(0, 64, flattens=False),
        order_rows=order_rows,
        state=SimpleNamespace(global_step=steps),
        args=SimpleNamespace(**given),
    )


def test_the_largest_batches_are_those_that_came():
    trainer = build_trainer(steps=1)
    (places,) = next(list_steps(trainer))
    found = find_run_batches(trainer, 0, scored_share=0.5)
    num_tokens = sum(LENGTHS[place] for place in places)
    (largest,) = found.largest
    assert num_tokens <= largest.num_tokens <= 1.03 * num_tokens
    assert largest.num_scored == num_tokens // 2
    assert largest.shares_sequences
    assert found.typical == largest


def test_all_epochs_of_a_run_count_and_nothing_before_its_first_step():
    whole = find_run_batches(build_trainer(steps=60), 0, scored_share=0.5)
    assert whole.largest[0] == Batch(2, 50, 45)  # 90 tokens, too long for one sequence
    assert len(whole.largest) == 3
    alone = build_trainer(steps=60, train_batch_size=1)
    found = find_run_batches(alone, 55, scored_share=0.2)
    assert found.typical == Batch(1, 30, 6, shares_sequences=False)
    assert [batch.length for batch in found.largest] == [50, 40, 30]


def test_ranks_and_steps_share_the_batches():
    steps = [
        next(list_steps(build_trainer(1, train_batch_size=1, world_size=2, process_index=rank))) for rank in (0, 1)
    ]
    (first,), (second,) = steps
    alone = list_steps(build_trainer(1, train_batch_size=1))
    assert [next(alone), next(alone)] == [[first], [second]]
    summed = next(list_steps(build_trainer(1, train_batch_size=1, gradient_accumulation_steps=2)))
    assert summed == [first, second]


@pytest.mark.parametrize("case", ["a stream", "no step"])
def test_batches_that_are_not_known(case):
    trainer = build_trainer(steps=3)
    if case == "a stream":
        trainer.train_dataset = IterableDataset.from_generator(lambda: iter(()))
    assert find_run_batches(trainer, 3 if case == "no step" else 0, 0.5) is None
