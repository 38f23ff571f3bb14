# SPDX-License-Identifier: Apache-2.0
"""A row's fields tell its format, among those of the job's method."""

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import METHOD_FORMATS
from llm_trainer.data.formats.detection import OtherMethodError, detect_format, list_needed_fields, list_read_fields
from llm_trainer.data.formats.examples import Conversation, Text
from support.row_parsing import CHAT, parse, problem_of


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


PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_a_row_of_another_method_is_told_with_the_method_that_takes_it():
    with pytest.raises(OtherMethodError, match=r"^is a preference row, which method=sft does not take: set method=dpo"):
        detect_format(PREFERENCE, Settings().data)
    with pytest.raises(OtherMethodError) as caught:
        detect_format({"messages": CHAT}, Settings(method="dpo").data)
    assert str(caught.value) == (
        "is a messages row, which method=dpo does not take: set method=sft or distill, or give rows with 'chosen' with "
        "'rejected'."
    )
    assert problem_of({"answer": "b"}, method="dpo") == (
        "has no field 'chosen' with 'rejected' (found: answer): rename the field."
    )


def test_a_row_that_has_the_fields_of_several_methods_is_of_the_jobs_own():
    row = {**PREFERENCE, "messages": CHAT}
    assert detect_format(row, Settings().data) == "messages"
    assert detect_format(row, Settings(method="dpo").data) == "preference"
    assert problem_of(PREFERENCE, dataset_format="text").startswith("is a preference row, which method=sft")


def test_every_format_of_every_method_has_fields():
    settings = Settings().data
    assert list_needed_fields(settings).keys() == {name for formats in METHOD_FORMATS.values() for name in formats}
    for name, habits in list_needed_fields(settings).items():
        for needed in habits:
            assert list_read_fields(name, settings, has_chat_template=True).issuperset(needed)
