# SPDX-License-Identifier: Apache-2.0
"""Formats of rows: which one a row has, by its fields, and which parser reads it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.config.sections import IMAGE_METHODS, METHOD_FORMATS, DataSettings
from llm_trainer.data.formats.examples import (
    Conversation,
    Example,
    Fields,
    Judged,
    Pair,
    Prompt,
    RowError,
    Text,
    Tokens,
)
from llm_trainer.data.formats.imitation import (
    TOKEN_FIELDS,
    parse_alpaca,
    parse_conversation,
    parse_prompt_completion,
    parse_tokens,
)
from llm_trainer.data.formats.pictures import VALUES, list_column, place_in_messages, place_in_text
from llm_trainer.data.formats.preferences import list_preference_fields, parse_preference
from llm_trainer.data.formats.prompts import ASKING_FIELDS, parse_prompt
from llm_trainer.data.formats.unpaired import is_judged, list_unpaired_fields, list_unpaired_needs, parse_unpaired
from llm_trainer.data.formats.values import parse_text
from llm_trainer.readers.rows import IMAGE_COLUMNS, PLACEHOLDER


class OtherMethodError(RowError):
    """A reason why a row cannot be used: it is of a format that another training method takes."""


class UntakenImagesError(RowError):
    """A reason why a row cannot be used, nor any like it: it has images, which its training method takes none of."""


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
    return take_pictures(parsers[row_format](), fields, settings.method)


def take_pictures(example: Example, fields: Fields, method: str) -> Example:
    """Return an example with the images of its row.

    Raises RowError where the row cannot be used with them, and UntakenImagesError where the method takes none.
    """
    if isinstance(example, Tokens):
        return example
    column = list_column(fields)
    if method not in IMAGE_METHODS:
        if column or any(map(has_images, list_sides(example))):
            raise UntakenImagesError(
                f"has images, which method={method} does not take: set method=sft, or remove them."
            )
        return example
    if isinstance(example, Pair):
        chosen, rejected = (place_in_side(side, column) for side in (example.chosen, example.rejected))
        return replace(example, chosen=chosen, rejected=rejected)
    assert isinstance(example, Conversation | Text)  # as these methods have no other rows
    return place_in_side(example, column)


def place_in_side(example: Conversation | Text, column: list[Any] | None) -> Conversation | Text:
    """Return a conversation or a text with the images of its row, whose column is None where it has none.

    Raises RowError.
    """
    if column == [] and has_placeholder(example):
        raise RowError(
            f"has the text {PLACEHOLDER} and nothing in its column of images: put the image there, or leave the column "
            "out where this is text."
        )
    if isinstance(example, Text):
        return place_in_example(example, column) if column else example
    messages, values = place_in_messages(example.messages, column or [])
    return replace(example, messages=messages, images=values) if values else example


def has_placeholder(example: Example) -> bool:
    """Tell whether a text or a message has a placeholder without an image."""
    if isinstance(example, Text):
        return PLACEHOLDER in example.text
    return isinstance(example, Conversation) and any(PLACEHOLDER in each["content"] for each in example.messages)


def place_in_example(example: Text, column: list[Any]) -> Text:
    """Return a text with the images of its row. Those of a prompt stand in the prompt. Raises RowError."""
    if example.num_prompt_characters is None:
        text, values = place_in_text(example.text, column)
        return Text(text, None, values)
    end = example.num_prompt_characters
    prompt, values = place_in_text(example.text[:end], column)
    return Text(prompt + example.text[end:], len(prompt), values)


def has_images(example: Example) -> bool:
    """Tell whether a conversation has images in its messages."""
    return isinstance(example, Conversation) and any(VALUES in message for message in example.messages)


def list_sides(example: Example) -> tuple[Example, ...]:
    """Return the parts of an example that are rendered by themselves."""
    if isinstance(example, Pair):
        return example.chosen, example.rejected
    if isinstance(example, Prompt):
        return (example.prompt,)
    return (example.answer if isinstance(example, Judged) else example,)


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
    columns = () if row_format == "pretokenized" else IMAGE_COLUMNS
    return frozenset((*read[row_format], *columns))
