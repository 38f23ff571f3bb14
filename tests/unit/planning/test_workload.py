# SPDX-License-Identifier: Apache-2.0
"""The work in rows of known lengths, and the steps that it makes."""

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.planning.workload import measure_work

LENGTHS = {100: 30, 200: 10}


def test_rows_are_counted_as_they_are_cut():
    work = measure_work(LENGTHS, {50: 4}, Settings(max_length=150).data)
    assert (work.num_sequences, work.num_tokens, work.longest_row, work.eval_tokens) == (40, 30 * 100 + 1500, 200, 200)
    assert work.row_tokens == pytest.approx((30 * 100**2 + 10 * 150**2) / 4500)


def test_packed_rows_share_sequences():
    work = measure_work(LENGTHS, {}, Settings(max_length=500, packing=True).data)
    assert work.num_sequences == 11  # 5,000 tokens, and nearly all slots are filled
    assert work.sequence_tokens == pytest.approx(5000 / 11)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, 15), ({"num_train_epochs": 0.5}, 3), ({"max_steps": 7}, 7), ({"num_train_epochs": 1}, 5)],
)
def test_epochs_make_steps_unless_these_are_given(settings, steps):
    given = Settings(**{"num_train_epochs": 3, **settings})
    assert measure_work(LENGTHS, {}, given.data).count_steps(8, given.training) == steps


def test_a_step_takes_pairs_and_work_counts_their_sequences():
    given = Settings(method="dpo", num_train_epochs=1)
    work = measure_work(LENGTHS, {}, given.data)
    assert work.num_sequences == 40
    assert work.count_steps(4, given.training) == 5  # 20 pairs
