# SPDX-License-Identifier: Apache-2.0
"""Preference rows of each habit become pairs with one prompt, which is written once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_trainer.data.formats.examples import Conversation, Pair, RowError, Text
from llm_trainer.data.formats.imitation import ALPACA_PLAIN
from llm_trainer.data.formats.preferences import ANSWER_MARKS, find_prompt_end
from support.row_parsing import parse, problem_of

SYSTEM = {"role": "system", "content": "s"}


def ask(text="a"):
    return {"role": "user", "content": text}


def say(text):
    return {"role": "assistant", "content": text}


def build_chats(prompt, chosen=None, rejected=None, tools=None):
    """Return the pair of conversations that begin with the prompt's messages."""
    sides = [[*prompt, *answer] for answer in (chosen or [say("b")], rejected or [say("c")])]
    return Pair(*(Conversation(side, tools, len(prompt), finds_answer=True) for side in sides))


def build_texts(prompt, chosen, rejected):
    return Pair(*(Text(prompt + answer, len(prompt)) for answer in (chosen, rejected)))


def parse_pair(fields, **settings):
    return parse(fields, method="dpo", **settings)


WHOLE = {"chosen": [ask(), say("b")], "rejected": [ask(), say("c")]}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": [ask()], "chosen": [say("b")], "rejected": [say("c")]}, id="TRL, conversational"),
        pytest.param(WHOLE, id="TRL and Argilla's dpo-mix, implicit prompt"),
        pytest.param({**WHOLE, "prompt": None}, id="a null prompt"),
        pytest.param({**WHOLE, "prompt": ""}, id="an empty prompt"),
        pytest.param({**WHOLE, "prompt": "a", "messages": WHOLE["chosen"]}, id="UltraFeedback binarized"),
        pytest.param({**WHOLE, "prompt": " a\n"}, id="a prompt with other white space"),
        pytest.param({**WHOLE, "prompt": [ask()]}, id="the prompt as messages, and again in both sides"),
        pytest.param({"prompt": "a", "chosen": [say("b")], "rejected": [say("c")]}, id="a text and messages"),
        pytest.param({"prompt": [ask()], "chosen": "b", "rejected": "c"}, id="messages and texts"),
        pytest.param({"system": "", "question": "a", "chosen": "b", "rejected": "c"}, id="Intel's orca_dpo_pairs"),
        pytest.param({"question": "a", "chosen": "b", "rejected": "c"}, id="a question"),
        pytest.param({"system": None, "prompt": "a", "chosen": "b", "rejected": "c"}, id="a null system prompt"),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            id="LLaMA-Factory's sharegpt",
        ),
        pytest.param({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, id="LLaMA-Factory's alpaca"),
        pytest.param({name: json.dumps(side) for name, side in WHOLE.items()}, id="CSV"),
        pytest.param({"messages": [ask()], "chosen": say("b"), "rejected": say("c")}, id="messages and one each"),
    ],
)
def test_each_habit_becomes_the_same_pair(row):
    assert parse_pair(row) == build_chats([ask()])


def test_texts_are_not_put_into_a_chat_template():
    assert parse_pair({"prompt": "Q: ", "chosen": "b", "rejected": "c"}) == build_texts("Q: ", "b", "c")
    assert parse_pair({"prompt": "", "chosen": "b", "rejected": "c"}) == build_texts("", "b", "c")
    row = {"prompt": "{x} is", "chosen": "[b", "rejected": '{"c": 1}'}  # begin like JSON
    assert parse_pair(row) == build_texts("{x} is", "[b", '{"c": 1}')


def test_an_instruction_has_alpacas_prompt_where_there_is_no_chat_template():
    for name in ("instruction", "question"):
        pair = parse_pair({name: "a", "chosen": "b", "rejected": "c"}, has_chat_template=False)
        assert pair == build_texts(ALPACA_PLAIN.format(instruction="a"), "b", "c")


def test_a_system_prompt_and_tools_come_before_both_sides():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"system": "s", "prompt": "a", "chosen": "b", "rejected": "c", "tools": json.dumps(tools)}
    assert parse_pair(row) == build_chats([SYSTEM, ask()], tools=tools)
    assert parse_pair({**WHOLE, "system": "s"}) == build_chats([SYSTEM, ask()])
    assert parse_pair({**WHOLE, "prompt": [SYSTEM, ask()]}) == build_chats([SYSTEM, ask()])
    own = {name: [SYSTEM, *side] for name, side in WHOLE.items()}
    for extra in ({}, {"system": "s"}, {"prompt": [SYSTEM, ask()]}, {"prompt": "a"}):
        assert parse_pair({**own, **extra}) == build_chats([SYSTEM, ask()])


def test_the_shared_beginning_of_whole_conversations_is_the_prompt():
    history = [ask("1"), say("2"), ask("a")]
    whole = {"chosen": [*history, say("b")], "rejected": [*history, say("c")]}
    for extra in ({}, {"prompt": "a"}, {"prompt": "1"}, {"prompt": history}):
        assert parse_pair({**whole, **extra}) == build_chats(history)


def test_all_turns_behind_a_prompt_are_answers():
    chosen, rejected = [say("b"), ask("d"), say("e")], [say("b"), ask("d"), say("f")]
    row = {"prompt": [ask()], "chosen": chosen, "rejected": rejected}
    assert parse_pair(row) == build_chats([ask()], chosen, rejected)
    row = {name: [ask(), *side] for name, side in (("chosen", chosen), ("rejected", [say("c"), *rejected[1:]]))}
    assert parse_pair(row) == build_chats([ask()], chosen, [say("c"), *rejected[1:]])


def test_a_side_that_is_the_beginning_of_the_other_still_has_an_answer():
    longer = [*WHOLE["chosen"], ask("d"), say("e")]
    pair = parse_pair({"chosen": WHOLE["chosen"], "rejected": longer})
    assert pair == build_chats([ask()], [say("b")], longer[1:])
    assert parse_pair({"chosen": longer, "rejected": longer}) == build_chats(longer[:3], [say("e")], [say("e")])


def test_a_conversation_may_go_on_in_both_sides():
    row = {"prompt": [ask("1"), say("2")], **WHOLE}
    assert parse_pair(row) == build_chats([ask("1"), say("2"), ask()])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "b", "rejected": "c"}, "has no prompt, and a 'chosen' and a 'rejected' that do not begin alike"),
        ({"chosen": [say("b")], "rejected": [say("c")]}, "do not begin with the same message"),
        ({"chosen": [ask("1"), say("b")], "rejected": [ask("2"), say("c")]}, "do not begin with the same message"),
        ({"system": "s", "chosen": "b", "rejected": "c"}, "do not begin with the same message"),
        ({**WHOLE, "prompt": "z"}, "has a prompt, and 'chosen' and 'rejected' begin with another message of the user"),
        ({**WHOLE, "rejected": [ask()]}, "field 'rejected' has no assistant message"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "field 'rejected' is white space"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "field 'chosen' is an empty text"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "field 'prompt' is a number and not a text"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "field 'chosen' is an empty list"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "field 'chosen' is a number"),
        ({"prompt": "a", "chosen": [say("")], "rejected": "c"}, "field 'chosen' has a message 1 whose 'content'"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
            "field 'rejected' has nothing behind its prompt",
        ),
    ],
)
def test_a_pair_that_cannot_be_used_says_why(row, problem):
    assert problem in problem_of(row, method="dpo")


DIALOGUE = "\n\nHuman: a\n\nAssistant: I b\n\nHuman: d\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (DIALOGUE, " I like it", " I do not"),  # HH-RLHF: the words that both answers begin with are theirs
        ("2 + 2 is", " four", " five"),  # no answer begins within a word
        ("a question", " yes", " yesterday"),
        ("A:\n\n", "four", "five"),
        ("### Instruction:\nx\n\n### Response:\n", "The b", "The c"),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "So b", "So c"),
    ],
)
def test_the_prompt_of_whole_texts_ends_where_the_answers_begin(prompt, chosen, rejected):
    whole = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    assert parse_pair(whole) == build_texts(prompt, chosen, rejected)


def test_a_dialogue_that_is_repeated_behind_its_prompt_is_written_once():
    whole = {"prompt": DIALOGUE, "chosen": f"{DIALOGUE} b", "rejected": f"{DIALOGUE} c"}
    assert parse_pair(whole) == build_texts(DIALOGUE, " b", " c")
    code = {"prompt": "def f():", "chosen": "def f(): 1", "rejected": "def f(): 2"}  # an answer may repeat a question
    assert parse_pair(code) == build_texts("def f():", "def f(): 1", "def f(): 2")


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1), st.sampled_from(ANSWER_MARKS))
def test_no_character_of_whole_texts_is_lost_and_each_has_an_answer(prompt, chosen, rejected, mark):
    sides = [f"a {prompt}{mark}{answer}x" for answer in (chosen, rejected)]
    end = find_prompt_end(*sides)
    assert sides[0][:end] == sides[1][:end]
    assert all(len(side) > end for side in sides)


@pytest.mark.parametrize(
    ("fields", "gap"),
    [
        ({}, None),
        ({"score_chosen": 8.5, "score_rejected": 3}, 5.5),
        ({"chosen_score": "2", "rejected_score": "4"}, -2),
        ({"rating_chosen": 5, "rating_rejected": None, "margin": 0.5}, None),
        ({"chosen_rating": True, "rejected_rating": 1}, None),
        ({"score_chosen": "good", "score_rejected": "nan"}, None),
    ],
)
def test_scores_tell_by_how_much_the_chosen_answer_is_better(fields, gap):
    assert parse_pair({**WHOLE, **fields}).score_gap == gap


@pytest.mark.parametrize(("value", "margin"), [(0.5, 0.5), ("2", 2), (0, 0), (None, None), ("", None)])
def test_a_margin_is_the_rows_own(value, margin):
    assert parse_pair({**WHOLE, "margin": value, "score_chosen": 9, "score_rejected": 1}).margin == margin


@pytest.mark.parametrize("value", ["large", [], True, "nan"])
def test_a_margin_that_is_no_number_is_refused(value):
    with pytest.raises(RowError, match=r"has margin=.* which is no number: give one, or leave it out"):
        parse_pair({**WHOLE, "margin": value})
