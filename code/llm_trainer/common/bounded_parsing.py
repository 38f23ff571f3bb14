# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML that a user or another program wrote, parsed within limits of size, depth, growth and number.

Both give the values that JSON has: objects, lists, texts, numbers, true, false and null. A date of YAML stays a text.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llm_trainer.common.errors import UserError, quote_error

MAX_JSON_BYTES = 64 * 2**20  # the index of a model with a million tensors fits
MAX_YAML_BYTES = 2**20  # YAML takes seconds a megabyte
MAX_DEPTH = 64  # lists and objects within each other: what reads a value later may call itself once a level
MAX_YAML_VALUES = 100_000  # with each alias counted as what it stands for
MAX_NUMBER_BITS = 64
TOO_DEEP = f"nests more than {MAX_DEPTH} lists and objects in each other"
NUMBER_TOO_LARGE = f"holds a whole number of more than {MAX_NUMBER_BITS} bits"


class UnreadableTextError(UserError):
    """A JSON or YAML text that is not valid, or not within the limits."""

    def __init__(self, name: str, reason: str, fix: str = "write it again") -> None:
        self.reason = reason  # the rest of a sentence that begins with the text's name
        super().__init__(f"{name} {reason}: {fix}.")


class TooMuch(ValueError):  # noqa: N818 (it names what is too much)
    """A value beyond the limits. Its text is the rest of a sentence."""


class JsonLikeLoader(yaml.CSafeLoader):
    """YAML's safe loader without the kinds of values that JSON lacks: dates, bytes, sets and pairs."""


JsonLikeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not str(tag).endswith(":timestamp")]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
JsonLikeLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.CSafeLoader.yaml_constructors.items()
    if not str(tag).endswith((":timestamp", ":binary", ":set", ":omap", ":pairs"))
}


def read_json(
    source: Path | str | bytes, name: str = "", max_bytes: int = MAX_JSON_BYTES, is_plain: bool = True
) -> Any:
    """Return the value of a JSON file or text; `name` names it in messages, as its path does by default.

    Without `is_plain`, texts may hold every character, and numbers 4,300 digits, as in files of models. A tokenizer
    without a limit has a model_max_length of 31 digits.
    Raises UnreadableTextError, also for a file that cannot be read.
    """
    name = name or (str(source) if isinstance(source, Path) else "The JSON text")
    text = read_text(source, name, max_bytes)
    try:
        value = json.loads(text)
        if is_plain:
            check_value(value)
        elif is_too_deep(value):
            raise TooMuch(TOO_DEEP)
    except TooMuch as error:
        raise UnreadableTextError(name, str(error)) from error
    except RecursionError as error:
        raise UnreadableTextError(name, TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise UnreadableTextError(name, f"is not valid JSON ({quote_error(error)})") from error
    except ValueError as error:  # Python refuses numbers of over 4,300 digits
        raise UnreadableTextError(name, NUMBER_TOO_LARGE) from error
    return value


def read_yaml(source: Path | str | bytes, name: str = "", max_bytes: int = MAX_YAML_BYTES) -> Any:
    """Return the value of a YAML file or text; `name` names it in messages, as its path does by default.

    Messages quote no part of the text, which may hold a secret. Raises UnreadableTextError, also for a file that
    cannot be read.
    """
    name = name or (str(source) if isinstance(source, Path) else "The YAML text")
    text = read_text(source, name, max_bytes)
    try:
        check_growth(text)
        value = yaml.load(text, JsonLikeLoader)  # a safe loader, whatever its name
        check_value(value)
    except TooMuch as error:
        raise UnreadableTextError(name, str(error)) from error
    except yaml.YAMLError as error:
        raise UnreadableTextError(name, f"is not valid YAML ({describe_yaml_error(error)})") from error
    except (ValueError, TypeError, LookupError) as error:  # PyYAML lets them pass for texts such as `0x_`, `!!bool x`
        raise UnreadableTextError(name, "is not valid YAML (a value is not what its tag or its form says)") from error
    return value


def read_text(source: Path | str | bytes, name: str, max_bytes: int) -> str:
    """Return the text of a file, or of UTF-8 bytes with or without a byte order mark. Raises UnreadableTextError."""
    content = read_bytes(source, name, max_bytes) if isinstance(source, Path) else source
    if len(content) > max_bytes:
        raise UnreadableTextError(name, f"is larger than {max_bytes / 2**20:g} MiB", "check that it is the right file")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise UnreadableTextError(name, f"is not UTF-8 text ({error.reason})", "save it as UTF-8") from error
    return text.removeprefix("\ufeff")


def read_bytes(file: Path, name: str, max_bytes: int) -> bytes:
    """Return a regular file's content, at most one byte more than allowed. Raises UnreadableTextError."""
    fix = "check that it is there and readable"
    try:
        # A pipe that nobody writes to would keep an ordinary open waiting without an end.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UnreadableTextError(name, "is no regular file", fix)
            return stream.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableTextError(name, f"cannot be read ({reason})", fix) from error


def check_growth(text: str) -> None:
    """Raise TooMuch where YAML nests too deeply, or its aliases stand for too many values or for themselves.

    libyaml yields events one after the other: nothing is built, and nothing calls itself.
    """
    counts = [0]  # values of each open list or object, the text itself first
    anchors: list[str | None] = [None]  # the anchor of each of them
    sizes: dict[str, int] = {}  # anchor -> values that an alias of it stands for
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise TooMuch(f"has an alias that stands for itself ({event.anchor!r})")
            counts[-1] += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = counts.pop(), anchors.pop()
            counts[-1] += size
            sizes |= {anchor: size} if anchor else {}
        else:
            counts[-1] += isinstance(event, yaml.ScalarEvent)
        if len(counts) > MAX_DEPTH + 1:
            raise TooMuch(TOO_DEEP)
        if counts[-1] > MAX_YAML_VALUES:
            raise TooMuch(f"stands for more than {MAX_YAML_VALUES} values")


def check_value(value: Any) -> None:
    """Raise TooMuch where a value nests too deeply, or holds a text or number that others could not take."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [part for each in level for part in list_parts(each)]
        if not level:
            return
    raise TooMuch(TOO_DEEP)


def is_too_deep(value: Any) -> bool:
    """Tell whether more than MAX_DEPTH lists and objects stand in each other, whatever else the value holds."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            part
            for each in level
            if isinstance(each, list | dict)
            for part in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


def list_parts(value: Any) -> Iterator[Any]:
    """Yield the elements of a list, or the keys and values of an object. Raises TooMuch for a text or number."""
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, str):
        check_text(value)
    elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise TooMuch(NUMBER_TOO_LARGE)


def check_text(text: str) -> None:
    """Raise TooMuch where a text holds a NUL character, which no path takes, or half a character."""
    if "\0" in text:
        raise TooMuch("holds a text with a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TooMuch(f"holds half a character ({text[error.start]!a})") from error


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the text around it."""
    place = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or type(error).__name__
    return f"{problem}, line {place.line + 1}, column {place.column + 1}" if place else str(problem)
