# SPDX-License-Identifier: Apache-2.0
"""Files of a channel -> rows -> examples: what a row means, whatever file it came from. No tokenizer, no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.errors import UserError
from llm_trainer.settings import Settings

SUFFIXES = (".json", ".jsonl")
MAX_PROBLEMS = 1000  # past this many bad rows the rest of the data is not worth reading


@dataclass(frozen=True)
class Row:
    """One row of a file, and where it stands, for messages."""

    fields: dict[str, Any]
    place: str


@dataclass(frozen=True)
class Example:
    """What a row trains on: a conversation, or a text; and the row's place, for messages."""

    place: str
    messages: list[dict[str, Any]] | None
    text: str | None


def find_files(path: Path) -> list[Path]:
    """The data files that a path means: itself, or those in the folder and below, by name. Hidden ones do not count."""
    if path.is_file():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def read_examples(files: list[Path], settings: Settings) -> Iterator[Example]:
    """Every example of the files, in order.

    Raises UserError with all unreadable or unusable rows, each with its file and row number, when the last was read.
    """
    problems: list[str] = []
    for row in read_rows(files, problems):
        found = parse_example(row, settings)
        if isinstance(found, Example):
            yield found
        else:
            problems.append(f"{row.place} {found}")
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise UserError(*problems)


def read_rows(files: list[Path], problems: list[str]) -> Iterator[Row]:
    for file in files:
        reader = read_array if starts_with_bracket(file) else read_lines
        yield from reader(file, problems)


def starts_with_bracket(file: Path) -> bool:
    """Whether the file holds one JSON array, as opposed to one object a line; its name does not tell."""
    with file.open("rb") as stream:
        while chunk := stream.read(4096):
            stripped = chunk.removeprefix(b"\xef\xbb\xbf").lstrip()
            if stripped:
                return stripped.startswith(b"[")
    return False


def read_array(file: Path, problems: list[str]) -> Iterator[Row]:
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        problems.append(f"{file.name} line {error.lineno} is not valid JSON ({error.msg}): mend or remove it.")
        return
    except UnicodeDecodeError as error:
        problems.append(f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.")
        return
    for number, value in enumerate(values, start=1):
        yield from check_row(value, f"{file.name} row {number}", problems)


def read_lines(file: Path, problems: list[str]) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                problems.append(
                    f"{file.name} line {number} is not valid JSON ({error.msg} at column {error.colno}): "
                    "write one JSON object a line, or the whole file as one array."
                )
            except UnicodeDecodeError as error:
                problems.append(f"{file.name} line {number} is not UTF-8 text ({error.reason}): save it as UTF-8.")
            else:
                yield from check_row(value, f"{file.name} row {number}", problems)
            if len(problems) >= MAX_PROBLEMS:
                return


def check_row(value: Any, place: str, problems: list[str]) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(value, place)
    else:
        problems.append(f"{place} is a JSON {type(value).__name__}: write each row as an object with named fields.")


def parse_example(row: Row, settings: Settings) -> Example | str:
    """The row's example, or what is wrong with it."""
    fields = row.fields
    wants_messages = settings.dataset_format in ("auto", "messages")
    wants_text = settings.dataset_format in ("auto", "text")
    if wants_messages and fields.get(settings.messages_field) is not None:
        messages = fields[settings.messages_field]
        problem = find_message_problem(messages)
        return f"field {settings.messages_field!r} {problem}" if problem else Example(row.place, messages, None)
    if wants_text and fields.get(settings.text_field) is not None:
        text = fields[settings.text_field]
        if isinstance(text, str) and text.strip():
            return Example(row.place, None, text)
        return f"field {settings.text_field!r} is not a text with something in it: fill or remove the row."
    wanted = [settings.messages_field] * wants_messages + [settings.text_field] * wants_text
    return (
        f"has no field {' or '.join(map(repr, wanted))} (found: {', '.join(fields) or 'none'}): "
        "rename the field, or name it with messages_field or text_field."
    )


def find_message_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "must be a list of at least one message."
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"has a message {number} without a 'role': write it as {{'role': ..., 'content': ...}}."
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"has a message {number} whose 'content' is not a text: give it a text."
    return None
