# SPDX-License-Identifier: Apache-2.0
"""A batch of pairs says where its trained tokens stand among padded answers, however its answers were packed."""

import random

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.training.methods.answers import ANSWERS, AnswerCollator, list_answers, number_labels
from llm_trainer.training.packing import PackingCollator

COLLATORS = {
    "stacked": PackingCollator(0, None, flattens=False),
    "stacked to a multiple": PackingCollator(0, 40, flattens=False, pad_to_multiple_of=8),
    "flattened": PackingCollator(0, None, flattens=True),
    "padded": DataCollatorForLanguageModeling(0),
}


def build_row(draw, number):
    prompt, chosen, rejected = ([draw.randrange(1, 90) for _ in range(draw.randint(1, 9))] for _ in range(3))
    ids = [*prompt, *chosen, *prompt, *rejected]
    hidden = [IGNORED] * len(prompt)
    labels = [*hidden, *chosen, *hidden, *rejected]
    lengths = [len(prompt) + len(chosen), len(prompt) + len(rejected)]
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths, "row": number}


ROWS = [build_row(random.Random(seed), seed) for seed in range(5)]
BLANK = {"input_ids": [3, 3], "labels": [IGNORED, IGNORED], "seq_lengths": [1, 1], "row": 0}


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
def test_each_trained_token_is_found_at_its_place(collator):
    batch = AnswerCollator(collator)(ROWS)
    pairs = batch[ANSWERS]
    predicted = batch["labels"][batch["labels"] != IGNORED]  # in the order in which a model computes them
    spread = pairs.spread(predicted)
    for row, answer in enumerate(list_answers(ROWS)):
        ids, labels = answer["input_ids"], answer["labels"]
        trained = [token if label != IGNORED else 0 for token, label in zip(ids, labels, strict=True)][1:]
        assert spread[row].tolist() == trained + [0] * (pairs.num_slots - len(trained))
    mask = pairs.describe()["completion_mask"]
    assert torch.equal(mask[:, 1:], (spread != 0).long())
    assert not mask[:, 0].any()


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
def test_tokens_and_pairs_are_counted_and_blank_rows_left_out(collator):
    pairs = AnswerCollator(collator)([*ROWS, BLANK])[ANSWERS]
    assert pairs.num_tokens == sum(len(row["input_ids"]) for row in ROWS)
    assert (pairs.num_rows, pairs.rows.tolist()) == (5, [0, 1, 2, 3, 4])
    alone = AnswerCollator(collator)([BLANK, BLANK])[ANSWERS]
    assert (alone.num_rows, alone.num_tokens, alone.is_blank, alone.num_answers) == (0, 0, True, 2)


def test_the_first_token_of_an_answer_is_never_predicted():
    assert number_labels([7, 8, IGNORED, 9], 10) == [IGNORED, 11, IGNORED, 13]


def test_gradients_flow_through_the_places():
    pairs = AnswerCollator(COLLATORS["padded"])(ROWS)[ANSWERS]
    values = torch.rand(len(pairs.places), requires_grad=True)
    pairs.spread(values).sum().backward()
    assert values.grad.tolist() == [1.0] * len(values)


def test_the_places_move_with_the_batch():
    pairs = AnswerCollator(COLLATORS["padded"])(ROWS)[ANSWERS]
    moved = pairs.to("meta", non_blocking=True)
    assert (moved.places.device.type, moved.rows.device.type) == ("meta", "meta")
    assert moved.num_slots == pairs.num_slots
