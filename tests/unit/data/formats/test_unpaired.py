# SPDX-License-Identifier: Apache-2.0
"""Judged answers of each habit become an answer with its prompt, and a judgement."""

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.detection import OtherMethodError, detect_format
from llm_trainer.data.formats.examples import Conversation, Judged, Text
from support.row_parsing import ANSWER, ASK, CHAT, parse, problem_of

EXPECTED = Conversation(CHAT, None, 1, finds_answer=True)


def parse_judged(fields, **settings):
    return parse(fields, method="kto", **settings)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"prompt": [ASK], "completion": [ANSWER], "label": True}, id="TRL's kto-mix-14k"),
        pytest.param({"messages": CHAT, "label": True}, id="LLaMA-Factory's kto_en_demo"),
        pytest.param({"messages": CHAT, "kto_tag": "true"}, id="a tag by its own name"),
        pytest.param({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": 1}),
        pytest.param({"instruction": "a", "input": "", "output": "b", "kto_tag": True}, id="LLaMA-Factory's alpaca"),
        pytest.param({"prompt": "a", "completion": [ANSWER], "label": True}, id="mixed"),
        pytest.param({"prompt": '[{"role": "user", "content": "a"}]', "completion": "b", "label": "1"}, id="CSV"),
    ],
)
def test_each_habit_is_one_answer_with_its_prompt(fields):
    assert detect_format(fields, Settings(method="kto").data) == "unpaired_preference"
    assert parse_judged(fields) == Judged(EXPECTED, True)


def test_texts_stay_texts():
    row = {"prompt": "a ", "completion": "b", "label": False}
    assert parse_judged(row) == Judged(Text("a b", 2), False)


def test_a_system_prompt_and_tools_are_the_prompts():
    tool = {"type": "function", "function": {"name": "f"}}
    system = {"role": "system", "content": "s"}
    row = {"prompt": "a", "completion": "b", "label": 0, "system": "s", "tools": [tool]}
    expected = Conversation([system, *CHAT], [tool], 2, finds_answer=True)
    assert parse_judged(row) == Judged(expected, False)
    assert parse_judged({**row, "prompt": [system, ASK]}) == Judged(expected, False)


def test_the_last_turn_of_a_conversation_is_judged():
    row = {"messages": [ASK, {"role": "assistant", "content": "x"}, *CHAT, ASK], "label": False}
    found = parse_judged(row)
    assert (len(found.answer.messages), found.answer.num_prompt_messages) == (4, 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (1, True), (1.0, True), ("True", True), ("1", True), (False, False), (0, False), ("false ", False)],
)
def test_a_label_may_be_a_number_or_a_text(value, expected):
    assert parse_judged({"prompt": "a", "completion": "b", "label": value}).is_desirable is expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "completion": "b", "label": "good"}, "field 'label' is 'good', which is not true or false"),
        ({"prompt": "a", "completion": "b", "kto_tag": 2}, "field 'kto_tag' is 2, which is not true or false"),
        ({"prompt": "a", "completion": "b", "label": [True]}, "field 'label' is [True], which is not true or false"),
        ({"prompt": "a", "completion": " ", "label": True}, "field 'completion' is white space"),
        ({"prompt": "a", "completion": [ASK], "label": True}, "field 'completion' has no assistant message"),
        ({"messages": [ASK], "label": True}, "field 'messages' has no assistant message"),
        ({"prompt": 3, "completion": "b", "label": True}, "field 'prompt' is a number and not a text"),
        ({"prompt": "a", "completion": "b"}, "is a prompt_completion row, which method=kto does not take"),
        ({"prompt": "a"}, "has no field 'prompt' with 'completion' with 'label' or 'chosen' with 'rejected'"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, problem):
    assert problem in problem_of(row, method="kto")


def test_judged_rows_are_not_imitated_unless_the_format_is_named():
    row = {"prompt": "a", "completion": "b", "label": False}
    with pytest.raises(OtherMethodError, match=r"method=sft would imitate it in either case: set method=kto"):
        detect_format(row, Settings().data)
    assert detect_format(row, Settings(dataset_format="prompt_completion").data) == "prompt_completion"
    assert detect_format({**row, "label": 3}, Settings().data) == "prompt_completion"
    with pytest.raises(OtherMethodError, match=r"is a unpaired_preference row|is an unpaired_preference row"):
        detect_format(row, Settings(method="dpo").data)
