# SPDX-License-Identifier: Apache-2.0
"""Rows that fill the ranks' last batch count for nothing."""

import pytest
from datasets import Dataset

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.training.batches.whole_batches import fill_batches

ROWS = Dataset.from_list(
    [{"input_ids": [7] * length, "labels": [7] * length, "length": length} for length in (4, 2, 9)]
)


def test_rows_that_fill_a_batch_have_no_label():
    filled = fill_batches(ROWS, 4)
    assert filled["length"][:] == [4, 2, 9, 1]
    assert filled[3] == {"input_ids": [7], "labels": [IGNORED], "length": 1}
    assert filled[2] == ROWS[2]
    assert fill_batches(ROWS, 3) is ROWS


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_such_a_row_has_as_many_sequences_as_others(num_sequences):
    rows = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [7, 8, 9], "seq_lengths": [2, 1], "row": 5}])
    expected = {"input_ids": [7] * num_sequences, "labels": [IGNORED] * num_sequences}
    expected |= {"seq_lengths": [1] * num_sequences, "row": 0}
    assert fill_batches(rows, 2, num_sequences)[1] == expected


def test_such_a_row_has_no_piece_of_an_image():
    image = {"path": "a.png", "start": 0, "tokens": 2}
    rows = Dataset.from_list([{"input_ids": [5, 5, 7], "labels": [IGNORED, IGNORED, 7], "pictures": [image]}])
    assert fill_batches(rows, 2)[1] == {"input_ids": [7], "labels": [IGNORED], "pictures": []}
