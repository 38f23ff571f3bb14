# SPDX-License-Identifier: Apache-2.0
"""A reference's values have a name that tells their content, and stand at the numbers of their rows."""

import torch
from accelerate import Accelerator

from llm_trainer.training.methods.answers import ANSWERS, AnswerCollator
from llm_trainer.training.methods.reference_values import build_key, compute_values, hash_rows, keep_values, load_values
from llm_trainer.training.packing import PackingCollator
from support.preference_pairs import build_rows

ROWS = build_rows(5)


def test_the_key_tells_the_model_and_the_rows():
    key = build_key({"base": "a"}, ROWS)
    assert key == build_key({"base": "a"}, build_rows(5))
    assert len({key, build_key({"base": "b"}, ROWS), build_key({"base": "a"}, build_rows(5, seed=1))}) == 3


def test_each_column_of_a_row_counts():
    changed = [ROWS.map(lambda row, name=name: {name: change(row[name])}) for name in ("input_ids", "labels", "row")]
    assert len({hash_rows(rows) for rows in (ROWS, *changed)}) == 4


def change(value):
    return [number + 1 for number in value] if isinstance(value, list) else value + 1


def test_values_stand_at_the_numbers_of_their_rows():
    collate = AnswerCollator(PackingCollator(0, None, flattens=False))
    batches = [collate([ROWS[place] for place in places]) for places in ([3, 1], [4, 0])]
    said = iter(([[3, 30], [1, 10]], [[4, 40], [0, 5]]))
    values = compute_values(batches, 5, Accelerator(cpu=True), lambda batch: torch.tensor(next(said)))
    assert values.tolist() == [[0, 5], [1, 10], [0, 0], [3, 30], [4, 40]]
    assert batches[0][ANSWERS].rows.tolist() == [3, 1]


def test_values_are_kept_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path))
    assert load_values("key", 2, None) is None
    values = torch.tensor([[0.1, -2.5], [3.0, 4.0]])
    keep_values("key", values, None)
    assert torch.equal(load_values("key", 2, None), values)
