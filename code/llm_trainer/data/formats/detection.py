# SPDX-License-Identifier: Apache-2.0
"""Formats of rows: which one a row has, by its fields, and which parser reads it."""

from collections.abc import Callable

from llm_trainer.common.errors import cut_quote
from llm_trainer.config.sections import METHOD_FORMATS, DataSettings
from llm_trainer.data.formats.examples import Example, Fields, RowError, Text
from llm_trainer.data.formats.imitation import (
    TOKEN_FIELDS,
    parse_alpaca,
    parse_conversation,
    parse_prompt_completion,
    parse_tokens,
)
from llm_trainer.data.formats.preferences import list_preference_fields, parse_preference
from llm_trainer.data.formats.prompts import ASKING_FIELDS, parse_prompt
from llm_trainer.data.formats.unpaired import is_judged, list_unpaired_fields, list_unpaired_needs, parse_unpaired
from llm_trainer.data.formats.values import parse_text


class OtherMethodError(RowError):
    """A reason why a row cannot be used: it is of a format that another training method takes."""


def detect_format(fields: Fields, settings: DataSettings) -> str:
    """Return the format whose fields the row has, or the one that `dataset_format` forces.

    Raises RowError where the row has the fields of no format, and OtherMethodError where another method takes it.
    """
    needs = list_needed_fields(settings)
    given = {name for name, value in fields.items() if value is not None}
    if settings.generates and not given.isdisjoint(ASKING_FIELDS):
        given.add("prompt")
    own = METHOD_FORMATS[settings.method] if settings.dataset_format == "auto" else (settings.dataset_format,)
    if settings.method == "sft" and settings.dataset_format == "auto" and is_judged(fields, settings.messages_field):
        raise OtherMethodError(
            "has an answer that is judged true or false, and method=sft would imitate it in either case: set "
            "method=kto, or dataset_format to imitate all answers."
        )
    for name in own:
        if any(map(given.issuperset, needs[name])):
            return name
    wanted = describe_needs([needs[name] for name in own])
    foreign = list_foreign_formats(settings.method)
    for name, methods in sorted(foreign.items(), key=lambda item: -len(needs[item[0]][0])):  # most fields first
        if any(map(given.issuperset, needs[name])):
            raise OtherMethodError(
                f"is a {name} row, which method={settings.method} does not take: set method={' or '.join(methods)}, "
                f"or give rows with {wanted}."
            )
    found = ", ".join(f"{name} (null)" if value is None else name for name, value in fields.items())
    fix = ", or name it with messages_field or text_field" if settings.method == "sft" else ""
    raise RowError(f"has no field {wanted} (found: {cut_quote(found) or 'none'}): rename the field{fix}.")


def describe_needs(needs: list[list[tuple[str, ...]]]) -> str:
    """Return words for the fields of formats, for those with several habits the first of them."""
    return " or ".join(" with ".join(map(repr, habits[0])) for habits in needs)


def list_needed_fields(settings: DataSettings) -> dict[str, list[tuple[str, ...]]]:
    """Return the fields that tell each format, in each of its habits."""
    return {
        "pretokenized": [("input_ids",)],
        "messages": [(settings.messages_field,)],
        "sharegpt": [("conversations",)],
        "prompt_completion": [("prompt", "completion")],
        "alpaca": [("instruction", "output")],
        "text": [(settings.text_field,)],
        "preference": [("chosen", "rejected")],
        "unpaired_preference": list_unpaired_needs(settings.messages_field),
        "prompt": [("prompt",)],
    }


def list_foreign_formats(method: str) -> dict[str, list[str]]:
    """Return each format that the method does not take, with the methods that do.

    A prompt alone tells no format: a row of any other has one too, and may have its answer under a wrong name.
    """
    foreign: dict[str, list[str]] = {}
    for other, formats in METHOD_FORMATS.items():
        for name in formats:
            if name not in (*METHOD_FORMATS[method], "prompt"):
                foreign.setdefault(name, []).append(other)
    return foreign


def parse_example(fields: Fields, row_format: str, settings: DataSettings, has_chat_template: bool) -> Example:
    """Parse a row of that format into an example. Raises RowError where the row cannot be used."""
    parsers: dict[str, Callable[[], Example]] = {
        "pretokenized": lambda: parse_tokens(fields),
        "messages": lambda: parse_conversation(fields, settings.messages_field),
        "sharegpt": lambda: parse_conversation(fields, "conversations"),
        "prompt_completion": lambda: parse_prompt_completion(fields),
        "alpaca": lambda: parse_alpaca(fields, has_chat_template),
        "text": lambda: Text(parse_text(fields, settings.text_field)),
        "preference": lambda: parse_preference(fields, settings.messages_field, has_chat_template),
        "unpaired_preference": lambda: parse_unpaired(fields, settings.messages_field, has_chat_template),
        "prompt": lambda: parse_prompt(fields, has_chat_template),
    }
    return parsers[row_format]()


def list_read_fields(row_format: str, settings: DataSettings, has_chat_template: bool) -> frozenset[str]:
    """Return the names of the fields that are read in rows of a format."""
    alpaca = ("instruction", "input", "output")
    read = {
        "pretokenized": TOKEN_FIELDS,
        "messages": (settings.messages_field, "tools", "system"),
        "sharegpt": ("conversations", "tools", "system"),
        "prompt_completion": ("prompt", "completion", "tools"),
        "alpaca": (*alpaca, "system", "history") if has_chat_template else alpaca,
        "text": (settings.text_field,),
        "preference": list_preference_fields(settings.messages_field),
        "unpaired_preference": list_unpaired_fields(settings.messages_field),
        "prompt": ("prompt", *ASKING_FIELDS, "system", "tools"),
    }
    return frozenset(read[row_format])
