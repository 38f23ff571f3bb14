# SPDX-License-Identifier: Apache-2.0
"""A value that cannot be used is told with its field and kind."""

import pytest

from support.row_parsing import ASK, CHAT, parse, problem_of


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": ""}, "field 'text' is an empty text"),
        ({"text": " \n"}, "field 'text' is white space"),
        ({"text": 3}, "field 'text' is a number"),
        ({"text": [["c"]]}, "field 'text' is a list"),
        ({"text": {"c": 1}}, "field 'text' is an object"),
        ({"messages": []}, "field 'messages' is an empty list and not a list of at least one message"),
        ({"messages": "hello"}, "field 'messages' is a text and not a list"),
        ({"messages": "[1"}, "holds JSON text that is not valid"),
        ({"messages": [{"content": "a"}]}, "field 'messages' has a message 1 without a 'role'"),
        ({"messages": [["a"]]}, "field 'messages' has a message 1 without a 'role'"),
        ({"messages": [ASK, {"role": "user", "content": None}]}, "a message 2 whose 'content' is null"),
        ({"messages": [{"role": "user", "content": 4}]}, "a message 1 whose 'content' is a number"),
        ({"messages": [{"role": "user", "content": ""}]}, "a message 1 whose 'content' is an empty text"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "a message 2 whose 'content' is white space"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "a tool call that has no function name"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "'tool_calls' is a number"),
        ({"messages": CHAT, "tools": "f"}, "field 'tools' is 'f' and not a list of JSON schemas"),
        ({"instruction": "a", "output": ""}, "field 'output' is an empty text"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_place_and_kind(fields, expected):
    assert expected in problem_of(fields)


def test_an_empty_system_prompt_is_no_mistake():
    assert parse({"messages": [{"role": "system", "content": ""}, *CHAT]}).messages[0]["content"] == ""
