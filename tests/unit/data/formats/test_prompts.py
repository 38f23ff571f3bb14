# SPDX-License-Identifier: Apache-2.0
"""Prompts of each habit, and the columns beside them with their types."""

import pytest

from llm_trainer.data.formats.examples import Conversation, Prompt, Text
from support.row_parsing import parse, problem_of

ASKED = [{"role": "user", "content": "1 + 1"}]


def parse_row(fields):
    return parse(fields, method="grpo")


def test_a_text_is_completed_as_it_is():
    assert parse_row({"prompt": "1 + 1 =", "solution": 2}) == Prompt(Text("1 + 1 ="), {"solution": 2})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ASKED, "answer": [2, None, {"a": 1.5}]},
        {"prompt": '[{"role": "user", "content": "1 + 1"}]', "answer": [2, None, {"a": 1.5}]},
    ],
    ids=["messages", "JSON text"],
)
def test_messages_and_columns_stay(fields):
    assert parse_row(fields) == Prompt(Conversation(ASKED), {"answer": [2, None, {"a": 1.5}]})


@pytest.mark.parametrize("name", ["question", "problem"])
def test_a_question_is_the_users(name):
    assert parse_row({name: "1 + 1", "answer": "2"}) == Prompt(Conversation(ASKED), {name: "1 + 1", "answer": "2"})


def test_a_system_prompt_comes_first():
    prompt = parse_row({"prompt": "1 + 1", "system": "Be brief."}).prompt
    assert [message["role"] for message in prompt.messages] == ["system", "user"]


def test_columns_of_trl_are_left_out():
    assert parse_row({"prompt": "a", "completion": "b", "images": [], "input_ids": [3]}).columns == {}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": 3}, "field 'prompt' is a number and not a text"),
        ({"prompt": " "}, "field 'prompt' is white space"),
        ({"prompt": [*ASKED, {"role": "assistant", "content": "2"}]}, "ends in a message of the assistant"),
        ({"solution": "2"}, "has no field 'prompt'"),
    ],
)
def test_a_row_that_cannot_be_completed_is_told(fields, sentence):
    assert sentence in problem_of(fields, method="grpo")
