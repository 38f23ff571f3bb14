# SPDX-License-Identifier: Apache-2.0
"""What an example tells of itself."""

import pytest

from llm_trainer.data.formats.examples import Conversation, Pair, Text


def test_the_assistants_turns_are_those_of_its_role():
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert Conversation([{"role": role, "content": "a"} for role in roles]).assistant_turns == [2, 4]


@pytest.mark.parametrize(("margin", "is_swapped"), [(None, False), (0.0, False), (1.5, False), (-1.5, True)])
def test_a_pair_is_swapped_where_its_scores_prefer_the_rejected_answer(margin, is_swapped):
    assert Pair(Text("a"), Text("b"), margin).is_swapped == is_swapped
    assert Pair(Text("a"), Text("b"), 1.0, score_gap=margin).is_swapped == (is_swapped and margin is not None)
