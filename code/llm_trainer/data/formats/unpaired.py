# SPDX-License-Identifier: Apache-2.0
"""Rows of one answer and a judgement of it: desirable or undesirable, as KTO learns from.

An answer stands in a field of its own, or it is the last turn of a conversation.
"""

from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.data.formats.examples import Conversation, Fields, Judged, RowError, Text
from llm_trainer.data.formats.preferences import (
    INSTRUCTION_FIELDS,
    any_answers,
    as_messages,
    list_system_prompt,
    read_prompt,
    read_side,
)
from llm_trainer.data.formats.turns import parse_messages, parse_tools, prepend_system_prompt

LABELS = ("label", "kto_tag")  # TRL's name, and LLaMA-Factory's
ANSWER_FIELDS = ("completion", "output")
WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # CSV has texts alone


def list_unpaired_needs(messages_field: str) -> list[tuple[str, ...]]:
    """Return the fields that tell such a row, in each habit."""
    places = (("prompt", "completion"), (messages_field,), ("conversations",), ("instruction", "output"))
    return [(*place, label) for label in LABELS for place in places]


def list_unpaired_fields(messages_field: str) -> tuple[str, ...]:
    """Return the names of the fields that are read in such rows."""
    return (*LABELS, *ANSWER_FIELDS, "prompt", messages_field, "conversations", *INSTRUCTION_FIELDS, "system", "tools")


def is_judged(fields: Fields, messages_field: str) -> bool:
    """Tell whether a row has an answer and a judgement of it that cannot be anything else."""
    has_label = any(isinstance(fields.get(label), bool) for label in LABELS)
    return has_label and any(fields.keys() >= {*needs} for needs in list_unpaired_needs(messages_field))


def parse_unpaired(fields: Fields, messages_field: str, has_chat_template: bool) -> Judged:
    """Parse an answer with its prompt, and the judgement. Raises RowError where the row cannot be used."""
    name = next(name for name in LABELS if fields.get(name) is not None)
    is_desirable = parse_label(fields[name], name)
    if any(fields.get(field) is not None for field in ANSWER_FIELDS):
        return Judged(parse_answer(fields, messages_field, has_chat_template), is_desirable)
    turns = messages_field if fields.get(messages_field) is not None else "conversations"
    return Judged(parse_last_turn(fields, turns), is_desirable)


def parse_label(value: Any, name: str) -> bool:
    """Return a judgement. Raises RowError where the value is none."""
    known = WORDS.get(str(value).strip().lower())
    if known is None:
        raise RowError(
            f"field {name!r} is {cut_quote(repr(value))}, which is not true or false: write true for a desirable "
            "answer, and false for an undesirable one."
        )
    return known


def parse_answer(fields: Fields, messages_field: str, has_chat_template: bool) -> Conversation | Text:
    """Parse a prompt and the answer in a field of its own. Raises RowError."""
    name = next(name for name in ANSWER_FIELDS if fields.get(name) is not None)
    answer, prompt = read_side(fields, name), read_prompt(fields, messages_field, has_chat_template) or []
    if isinstance(prompt, str) and isinstance(answer, str):
        return Text(prompt + answer, len(prompt))
    before, after = as_messages(prompt, "user"), as_messages(answer, "assistant")
    if not any_answers(after):
        raise RowError(f"field {name!r} has no assistant message: there is no answer to judge.")
    before = [*list_system_prompt(fields, before), *before]
    return Conversation([*before, *after], parse_tools(fields.get("tools")), len(before), finds_answer=True)


def parse_last_turn(fields: Fields, name: str) -> Conversation:
    """Parse a conversation whose last turn of the assistant is judged. Raises RowError where it has none."""
    messages = prepend_system_prompt(parse_messages(fields[name], name), fields)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise RowError(f"field {name!r} has no assistant message: there is no answer to judge.")
    last = places[-1]
    return Conversation(messages[: last + 1], parse_tools(fields.get("tools")), last, finds_answer=True)
