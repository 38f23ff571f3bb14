# SPDX-License-Identifier: Apache-2.0
"""Images in a row's messages and columns: each leaves a mark in the text where it stands.

A row has them in parts of a content, such as {"type": "image", "image": ...} or OpenAI's {"type": "image_url", ...}.
Or it has a column `images` or `image`, and a placeholder for each: a part without a value, or <image> in a text.
"""

import re
from dataclasses import replace
from typing import Any

from llm_trainer.data.formats.examples import Fields, RowError, Text
from llm_trainer.data.formats.values import describe_value, parse_json_text
from llm_trainer.readers.images import DATA_URI, is_data_uri
from llm_trainer.readers.rows import IMAGE_COLUMNS, PLACEHOLDER, FilePart

# Stands for an image in a text. These characters are for private use.
IMAGE_MARK = "\ue7c3\ue7a8\ue7c3"
PART_KINDS = ("image", "image_url", "input_image")
PART_VALUES = ("image", "image_url", "url", "path", "base64", "bytes")
VALUES = IMAGE_MARK  # the key of a message's own images, until its row is whole: no row has such a key


def list_column(fields: Fields) -> list[Any] | None:
    """Return the values of a row's column of images, None where it has no such column.

    Raises RowError where both columns have images.
    """
    values = [parse_json_text(fields[name]) for name in IMAGE_COLUMNS if name in fields]
    if not values:
        return None
    given = [value for value in values if value not in ("", []) and not is_unfilled(value)]
    if len(given) > 1:
        both = " and ".join(map(repr, IMAGE_COLUMNS))
        raise RowError(f"has images in both columns {both}: put all of them into one.")
    return [own for value in given for own in (value if isinstance(value, list) else [value])]


def is_unfilled(value: Any) -> bool:
    """Tell whether a value is null, or an object of nulls, as some tables have it in its place."""
    return value is None or (isinstance(value, dict) and all(own is None for own in value.values()))


def refuse_marks(value: Any) -> None:
    """Raise RowError where a text of a row has the characters that stand for an image here."""
    if isinstance(value, str):
        if IMAGE_MARK in value:
            raise RowError(
                f"has the private characters {IMAGE_MARK!a} in a text, which stand for an image: remove them."
            )
    elif isinstance(value, dict):
        for name, part in value.items():
            refuse_marks(name)
            refuse_marks(part)
    elif isinstance(value, list):
        for part in value:
            refuse_marks(part)


def is_image_part(part: Any) -> bool:
    """Tell whether a part of a content is an image."""
    return isinstance(part, dict) and part.get("type") in PART_KINDS


def take_images(message: Fields) -> Fields:
    """Return a message with marks in place of the image parts of its content, whose values stand in a field apart.

    A part without a value stands for the next image of the row's column.
    """
    content = message.get("content")
    if not isinstance(content, list) or not any(map(is_image_part, content)):
        return message
    values = [read_part(part) for part in content if is_image_part(part)]
    parts = [{"type": "text", "text": IMAGE_MARK} if is_image_part(part) else part for part in content]
    return {**message, "content": parts, VALUES: values}


def read_part(part: Fields) -> Any:
    """Return the value of an image part; None without one. Raises RowError for one of another kind."""
    given = [(name, part[name]) for name in PART_VALUES if not is_unfilled(part.get(name))]
    if not given:
        return None
    name, value = given[0]
    if name == "base64" and isinstance(value, str) and not is_data_uri(value):
        value = f"{DATA_URI}image;base64,{value}"
    return read_value(value)


def read_value(value: Any) -> str | bytes | FilePart:
    """Return a name, an address, a data URI, bytes, or a part of a file. Raises RowError for any other value."""
    value = parse_json_text(value)
    if isinstance(value, dict):  # datasets' Image feature, or OpenAI's image_url
        data = value.get("bytes")
        value = data or value.get("url") or value.get("path")
        if not value:
            raise RowError("has an image that is an object without bytes, url and path: give one of them.")
        if isinstance(data, str) and data:  # bytes that happen to be UTF-8, which a table gives as a text
            value = data.encode()
    if not isinstance(value, str | bytes | FilePart) or not value:
        raise RowError(
            f"has an image that is {describe_value(value)}: give a file's name, a data URI, or the bytes of the file."
        )
    return value


def split_parts(content: str) -> list[Fields]:
    """Return a text with marks as a list of parts, as chat templates of image models take a content."""
    parts: list[Fields] = []
    for number, text in enumerate(content.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts or [{"type": "text", "text": ""}]


def place_in_messages(messages: list[Fields], column: list[Any]) -> tuple[list[Fields], tuple[Any, ...]]:
    """Return messages with a mark for each image, and the images' values in their order. Raises RowError.

    `column` has the values that the row gives apart from its messages.
    """
    if column:
        messages = mark_placeholders(messages, len(column))
    own = [value for message in messages for value in message.get(VALUES, ())]
    if own.count(None) != len(column):
        raise RowError(
            f"has {len(column)} images and {own.count(None)} placeholders for them: give each image its {PLACEHOLDER}, "
            f"and each placeholder its image in the column {IMAGE_COLUMNS[0]!r}."
        )
    given = iter(column)
    plain = [{name: value for name, value in message.items() if name != VALUES} for message in messages]
    return plain, tuple(read_value(next(given) if value is None else value) for value in own)


def mark_placeholders(messages: list[Fields], num_images: int) -> list[Fields]:
    """Return messages whose texts have marks in place of <image>. Without any, all images begin the first question.

    Raises RowError where nobody asks.
    """
    messages = [mark_message(message) for message in messages]
    if any(None in message.get(VALUES, ()) for message in messages):
        return messages
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError(f"has images and no message of a user: put {PLACEHOLDER} where each image stands.")
    question = messages[first]
    values = [*([None] * num_images), *question.get(VALUES, ())]
    begun = {**question, "content": IMAGE_MARK * num_images + question["content"], VALUES: values}
    return [*messages[:first], begun, *messages[first + 1 :]]


def mark_message(message: Fields) -> Fields:
    """Return a message with a mark in place of each <image> of its text. Its own values keep their places."""
    if PLACEHOLDER not in message["content"]:
        return message
    own = iter(message.get(VALUES, ()))
    pieces = re.split(f"({IMAGE_MARK}|{PLACEHOLDER})", message["content"])
    values = [next(own) if piece == IMAGE_MARK else None for piece in pieces[1::2]]
    return {**message, "content": IMAGE_MARK.join(pieces[::2]), VALUES: values}


def drop_added_marks(example: Text, token: str) -> Text:
    """Return a text that has the model's own token for each image without the marks that were put at its beginning.

    TRL writes so the texts of its standard format.
    """
    marks = IMAGE_MARK * len(example.images)
    own = example.text.removeprefix(marks)
    if own == example.text or IMAGE_MARK in own or own.count(token) != len(example.images):
        return example
    end = example.num_prompt_characters
    return replace(example, text=own, num_prompt_characters=None if end is None else end - len(marks))


def place_in_text(text: str, column: list[Any]) -> tuple[str, tuple[Any, ...]]:
    """Return a text with a mark for each image of the row's column, and their values. Raises RowError.

    Without placeholders the images begin the text.
    """
    if not column:
        return text, ()
    text = text.replace(PLACEHOLDER, IMAGE_MARK)
    found = text.count(IMAGE_MARK)
    if found not in (0, len(column)):
        raise RowError(
            f"has {len(column)} images and {found} placeholders for them: give each image its {PLACEHOLDER}."
        )
    return text if found else IMAGE_MARK * len(column) + text, tuple(map(read_value, column))
