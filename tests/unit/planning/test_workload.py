# SPDX-License-Identifier: Apache-2.0
"""The work in rows of known lengths, and the steps that it makes."""

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.planning.workload import measure_work

LENGTHS = {100: 30, 200: 10}


def test_rows_are_counted_as_they_are_cut():
    work = measure_work(LENGTHS, {50: 4}, Settings(max_length=150))
    assert (work.num_sequences, work.num_tokens, work.longest_row, work.eval_tokens) == (40, 30 * 100 + 1500, 200, 200)
    assert work.row_tokens == pytest.approx((30 * 100**2 + 10 * 150**2) / 4500)


def test_packed_rows_share_sequences():
    work = measure_work(LENGTHS, {}, Settings(max_length=500, packing=True))
    assert work.num_sequences == 11  # 5,000 tokens, and nearly all slots are filled
    assert work.sequence_tokens == pytest.approx(5000 / 11)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, 15), ({"num_train_epochs": 0.5}, 3), ({"max_steps": 7}, 7), ({"num_train_epochs": 1}, 5)],
)
def test_epochs_make_steps_unless_these_are_given(settings, steps):
    given = Settings(**{"num_train_epochs": 3, **settings})
    assert measure_work(LENGTHS, {}, given).count_steps(8, given.training) == steps


def test_a_step_takes_pairs_and_work_counts_their_sequences():
    given = Settings(method="dpo", num_train_epochs=1)
    work = measure_work(LENGTHS, {}, given)
    assert work.num_sequences == 40
    assert work.count_steps(4, given.training) == 5  # 20 pairs


def test_prompts_count_with_their_completions_and_those_that_are_too_long_not_at_all():
    given = Settings(
        method="grpo", num_train_epochs=1, max_length=150, max_completion_length=50, num_generations=4,
        num_generations_eval=2, num_iterations=3,
    )  # fmt: skip
    work = measure_work(LENGTHS, {100: 5}, given)
    assert (work.num_sequences, work.num_tokens, work.eval_tokens) == (120, 120 * 150, 10 * 150)
    assert work.scored_share == pytest.approx(1 / 3)
    assert work.count_steps(8, given.training) == 3 * 15
    assert work.read_tokens == 30 * 100 + 10 * 200 + 5 * 100  # nobody has to tokenize completions
