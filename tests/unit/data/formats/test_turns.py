# SPDX-License-Identifier: Apache-2.0
"""Messages, calls and tools of each habit get the form that chat templates know."""

import json

import pytest

from llm_trainer.data.formats.examples import Conversation
from support.row_parsing import ANSWER, ASK, CHAT, parse, problem_of


def test_messages_may_be_json_text_with_tools():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": json.dumps(CHAT), "tools": json.dumps(tools)}
    assert parse(row) == parse({"messages": CHAT, "tools": tools}) == Conversation(CHAT, tools)
    assert parse({"messages": CHAT, "tools": [json.dumps(tools[0])]}).tools == tools
    assert parse({"messages": CHAT, "tools": []}).tools is None


def test_sharegpt_roles_are_those_of_chat_templates():
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("observation", "c"), ("narrator", "d")]
    conversations = [{"from": role, "value": value} for role, value in turns]
    roles = [message["role"] for message in parse({"conversations": conversations}).messages]
    assert roles == ["system", "user", "assistant", "tool", "narrator"]
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    assert parse({"conversations": [call], "system": "be kind"}).messages == [
        {"role": "system", "content": "be kind"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
    ]


def test_a_call_in_sharegpts_form_keeps_its_marks():
    call = {"from": "function_call", "value": '{"name": "f"}', "train": False}
    assert parse({"conversations": [call]}).messages[0]["train"] is False


def test_a_system_prompt_may_be_parts_of_text():
    row = {"messages": [{**ASK, "content": [{"text": "a"}]}, ANSWER], "system": [{"text": "be "}, {"text": "kind"}]}
    assert parse(row).messages == [{"role": "system", "content": "be kind"}, *CHAT]
    assert "field 'system' is a list" in problem_of({**row, "system": [{"image": "b"}]})


def test_openai_tool_calls_get_arguments_that_templates_can_render():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    (message,) = parse({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}).messages
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert message["tool_calls"][0]["id"] == "1"


def parse_call(function):
    (message,) = parse({"messages": [{"role": "assistant", "content": "", "tool_calls": [function]}]}).messages
    return message["tool_calls"][0]["function"]


@pytest.mark.parametrize("given", [{"arguments": none} for none in ("", " ", None, "null", {}, "{}")] + [{}])
def test_a_call_without_arguments_has_an_empty_object(given):
    assert parse_call({"function": {"name": "f", **given}}) == {"name": "f", "arguments": {}}
    assert parse_call({"name": "f", **given}) == {"name": "f", "arguments": {}}


def test_arguments_of_llamas_form_are_read():
    assert parse_call({"name": "f", "parameters": {"x": 1}}) == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (
            {"name": "f", "arguments": "[1]"},
            "with a call of 'f' whose 'arguments' are a list and not an object: write {",
        ),
        ({"name": "f", "arguments": "5"}, "whose 'arguments' are a number and not an object"),
        ({"name": "f", "arguments": '"x"'}, "whose 'arguments' are a text and not an object"),
        ({"name": "f", "arguments": ["x"]}, "whose 'arguments' are a list and not an object"),
        ({"name": "f", "arguments": "x=1"}, "with a call of 'f' whose 'arguments' are not valid JSON ("),
        (
            {"name": "f", "args": {"x": 1}},
            "with a call of 'f' that has 'args' and no 'arguments': name them 'arguments'.",
        ),
        ({"arguments": {}}, "with a tool call that has no function name"),
        ({"name": "", "arguments": {}}, "with a tool call that has no function name"),
    ],
)
def test_arguments_that_are_no_object_are_refused(function, problem):
    for call in (function, {"type": "function", "function": function}):
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        assert problem in problem_of({"messages": [message]})


@pytest.mark.parametrize("none", [[], None, "", "[]"])
def test_no_tool_calls_are_no_tool_calls(none):
    answer = {**ANSWER, "tool_calls": none}
    assert parse({"messages": [ASK, answer]}) == Conversation(CHAT)
    empty = {"role": "assistant", "content": "", "tool_calls": none}
    assert "whose 'content' is an empty text" in problem_of({"messages": [ASK, empty]})


def test_calls_and_results_of_the_older_form_become_those_of_the_new():
    old = [
        ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
        {**ANSWER, "function_call": None},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert parse({"messages": old}).messages == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "2"},
        ANSWER,
    ]


def test_tools_may_be_bare_functions():
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    whole = {"type": "function", "function": function}
    bare = (function, {"type": "function", **function}, json.dumps(function), {"function": function})
    for tool in (whole, *bare, {"function": json.dumps(function)}, {**function, "parameters": '{"type": "object"}'}):
        assert parse({"messages": CHAT, "tools": [tool]}).tools == [whole]
    assert parse({"messages": CHAT, "tools": [{"type": "web_search"}]}).tools == [{"type": "web_search"}]
    assert "field 'tools' has a function without a name" in problem_of({"messages": CHAT, "tools": [{"function": {}}]})


def test_reasoning_needs_no_content():
    (message,) = parse({"messages": [{"role": "assistant", "content": None, "reasoning_content": "hm"}]}).messages
    assert message == {"role": "assistant", "content": "", "reasoning_content": "hm"}


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"
    sound = [{"type": "input_audio", "input_audio": {}}]
    assert "message 1 whose 'content' has a part of type 'input_audio'" in problem_of(
        {"messages": [{"role": "user", "content": sound}]}
    )
