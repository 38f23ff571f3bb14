# SPDX-License-Identifier: Apache-2.0
"""Rows to imitate become examples, in each of their formats."""

from llm_trainer.data.formats.examples import Conversation, Text, Tokens
from support.row_parsing import ANSWER, ASK, CHAT, parse, problem_of


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
