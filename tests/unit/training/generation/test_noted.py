# SPDX-License-Identifier: Apache-2.0
"""A bounded number of completions is noted, spread over a batch, with what they earned."""

import math

from llm_trainer.training.generation.noted import MAX_CHARACTERS, describe_completions, is_noted, show_text


def build_logs(total):
    return {
        "prompt": [f"p{place}" for place in range(total)],
        "completion": [[{"role": "assistant", "content": f"c{place}"}] for place in range(total)],
        "advantages": [0.5] * total,
        "rewards": {"math": [math.nan, *[1.0] * (total - 1)]},
    }


def test_completions_are_spread_over_the_batch():
    noted = describe_completions(build_logs(10))
    assert [each["completion"] for each in noted] == ["c0", "c3", "c6", "c9"]
    assert [each["rewards"] for each in noted[:2]] == [{"math": None}, {"math": 1.0}]
    assert len(describe_completions(build_logs(2))) == 2


def test_long_texts_are_cut():
    assert len(show_text("x" * (MAX_CHARACTERS + 1))) == MAX_CHARACTERS + 4


def test_a_long_run_notes_some_steps():
    assert sum(is_noted(step, 100_000) for step in range(1, 100_001)) == 200
    assert all(is_noted(step, 100) for step in range(1, 101))
