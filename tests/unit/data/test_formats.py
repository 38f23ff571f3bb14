# SPDX-License-Identifier: Apache-2.0
"""A row's fields become an example whatever habit they follow, or a sentence that says what to mend."""

import json

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.formats import Conversation, RowError, Text, Tokens, detect_format, parse_example

ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
CHAT = [ASK, ANSWER]


def parse(fields, has_chat_template=True, **settings):
    chosen = Settings(**settings).data
    return parse_example(fields, detect_format(fields, chosen), chosen, has_chat_template)


def problem_of(fields, **settings):
    with pytest.raises(RowError) as caught:
        parse(fields, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "c"}, "text"),
        ({"messages": CHAT}, "messages"),
        ({"messages": CHAT, "text": "c", "prompt": "c"}, "messages"),
        ({"messages": None, "text": "c"}, "text"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"input_ids": [1], "text": "c"}, "pretokenized"),
    ],
)
def test_the_format_is_told_by_the_fields(fields, expected):
    assert detect_format(fields, Settings().data) == expected


def test_a_format_can_be_forced():
    assert parse({"messages": CHAT, "text": "c"}, dataset_format="text") == Text("c")
    assert "has no field 'messages' (found: text)" in problem_of({"text": "c"}, dataset_format="messages")


def test_fields_may_have_other_names():
    assert parse({"chat": CHAT}, messages_field="chat") == Conversation(CHAT)
    assert parse({"body": "c"}, text_field="body") == Text("c")


def test_a_row_of_no_format_is_told_with_its_fields():
    assert problem_of({"question": "a", "answer": None}) == (
        "has no field 'input_ids' or 'messages' or 'conversations' or 'prompt' with 'completion' or 'instruction' with "
        "'output' or 'text' (found: question, answer (null)): rename the field, or name it with messages_field or "
        "text_field."
    )
    assert "(found: none)" in problem_of({})


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
    image = [{"type": "image_url", "image_url": {}}]
    assert "message 1 whose 'content' has a part of type 'image_url'" in problem_of(
        {"messages": [{"role": "user", "content": image}]}
    )


def test_prompt_and_completion_are_two_texts_or_two_lists():
    assert parse({"prompt": "a ", "completion": "b"}) == Text("a b", 2)
    assert parse({"prompt": "", "completion": "b"}) == Text("b", 0)
    assert parse({"prompt": [ASK], "completion": [ANSWER]}) == Conversation(CHAT, None, 1)
    assert "field 'completion' has no assistant message" in problem_of({"prompt": [ASK], "completion": [ASK]})
    assert "field 'prompt' is a number" in problem_of({"prompt": 3, "completion": "b"})
    assert "field 'completion' is white space" in problem_of({"prompt": "a", "completion": " "})


def test_alpaca_is_a_conversation_where_there_is_a_template_and_its_authors_text_elsewhere():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "be kind"}
    assert [message["content"] for message in parse(row).messages] == ["be kind", "Add.\n\n1 2", "3"]
    text = parse(row, has_chat_template=False)
    assert text.text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.text[text.num_prompt_characters :] == "3"
    short = parse({"instruction": "Go.", "input": "", "output": "3"}, has_chat_template=False)
    assert "### Input" not in short.text


def test_masks_of_trl_tell_what_is_trained_on_where_there_are_no_labels():
    masks = {"completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}
    assert parse({"input_ids": [1, 2, 3], **masks}) == Tokens([1, 2, 3], [-100, 2, -100])
    assert parse({"input_ids": [1, 2, 3], **masks, "labels": [1, 2, -100]}) == Tokens([1, 2, 3], [1, 2, -100])
    assert "has input_ids of 3, completion_mask of 1" in problem_of({"input_ids": [1, 2, 3], "completion_mask": [1]})


def test_tokenized_rows_lose_their_padding_and_keep_their_labels():
    assert parse({"input_ids": [1, 2]}) == Tokens([1, 2], [1, 2])
    row = {"input_ids": [1, 2, 0], "labels": [-100, 2, -100], "attention_mask": [1, 1, 0]}
    assert parse(row) == Tokens([1, 2], [-100, 2])
    assert "has input_ids of 2, labels of 1: they" in problem_of({"input_ids": [1, 2], "labels": [1]})
    assert "has no input_ids" in problem_of({"input_ids": []})
    for wrong in (["1"], "1", [[1]], [1.5], [True], 7):
        assert "field 'input_ids' is not a list of whole numbers" in problem_of({"input_ids": wrong})


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
