# SPDX-License-Identifier: Apache-2.0
"""Each prompt gets an answer to another one, the same in every run, cut as rows are."""

import numpy as np
import pytest
from datasets import Dataset

from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.mismatched import add_mismatched, draw_others, mismatch

ROWS = [
    {"input_ids": [1, 2, 10], "labels": [IGNORED, IGNORED, 10], "row": 0},
    {"input_ids": [3, 20, 21, 22], "labels": [IGNORED, 20, IGNORED, 22], "row": 1},
    {"input_ids": [4, 5, 6, 30], "labels": [IGNORED, IGNORED, IGNORED, 30], "row": 2},
]


def test_every_prompt_has_another_answer_and_every_answer_comes_once(tmp_path):
    rows = add_mismatched(Dataset.from_list(ROWS), Settings(method="kto").data, tmp_path / "train")
    answers = {row["row"]: (row["input_ids"][-1], row["other_ids"], row["other_labels"]) for row in rows}
    assert sorted(other[-1] for _, other, _ in answers.values()) == [10, 22, 30]
    for number, prompt in enumerate(([1, 2], [3], [4, 5, 6])):
        own, other, labels = answers[number]
        assert other[: len(prompt)] == prompt
        assert other[-1] != own
        assert labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert labels[-1] == other[-1]
    assert rows["input_ids"][:] == [row["input_ids"] for row in ROWS]


def test_the_draw_is_one_round_through_all_rows():
    others = draw_others(50)
    assert sorted(others) == list(range(50))
    assert np.array_equal(others, draw_others(50))
    place, seen = 0, set()
    for _ in range(50):
        seen.add(place := others[place])
    assert len(seen) == 50


@pytest.mark.parametrize(
    ("mode", "expected"), [("keep_start", [4, 5, 6, 20]), ("keep_end", [6, 20, 21, 22])], ids=["start", "end"]
)
def test_it_is_cut_to_max_length(mode, expected):
    row, other = ({name: np.array(values) for name, values in ROWS[place].items()} for place in (2, 1))
    ids, labels = mismatch(row, other, Settings(method="kto", max_length=4, truncation_mode=mode).data)
    assert ids.tolist() == expected
    assert len(labels) == 4
