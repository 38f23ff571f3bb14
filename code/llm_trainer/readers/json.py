# SPDX-License-Identifier: Apache-2.0
"""JSON files -> rows: one object a line, or one array, read as it comes and never as a whole."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from llm_trainer.readers.rows import BadRow, DamagedFile, Numbered

READ_BYTES = 2**20  # of a JSON array at a time
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
LONGEST_TOKEN = 16  # characters: -Infinity, or an escaped surrogate pair, may be split between two reads
WHITE = re.compile(r"[ \t\n\r]*")


class DuplicateKey(ValueError):  # noqa: N818 (it is the key that is there twice)
    """A JSON object has a key twice, so that one of the two values would be lost."""


def read_json(stream: io.BufferedReader, name: str, is_json_lines: bool) -> Iterator[Numbered]:
    """Rows of a JSON array, or of one JSON text a line; which, the content tells, and not the name.

    Objects over several lines are read too, unless the name says that there is one a line: then it is a broken line.
    """
    line = 1 + skip_white(stream)
    if stream.peek(1).startswith(b"["):
        yield from read_array(JsonText(stream, name, "its JSON array", line))
        return
    if is_json_lines:
        yield from read_lines(stream, line)
        return
    head = stream.readline()
    if starts_long_json(head):
        yield from read_values(JsonText(stream, name, "a JSON object", line, head))
    else:
        yield from read_lines(itertools.chain([head], stream), line)


def skip_white(stream: io.BufferedReader) -> int:
    """Go to the first byte that is not white space, and return how many lines ended before it."""
    lines = 0
    while head := stream.peek(1):
        text = head.lstrip()
        white = stream.read(len(head) - len(text))
        lines += white.count(b"\n")
        if text:
            break
    return lines


def starts_long_json(head: bytes) -> bool:
    """Whether a file's first line is the beginning of a JSON text or of several: neither whole nor broken."""
    try:
        parse_json(head)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data" or is_cut(error)
    except ValueError:
        return False
    return False


def read_lines(lines: Iterable[bytes], first: int) -> Iterator[Numbered]:
    for number, line in enumerate(lines, start=first):
        if not line.isspace():
            yield number, line, len(line)


def read_array(text: "JsonText") -> Iterator[Numbered]:
    text.skip()
    if text.peek() != "]":
        yield text.read_row()
        while text.peek() == ",":
            text.skip()
            yield text.read_row()
    if text.peek() != "]":
        raise text.damage(json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position))
    text.skip()
    if text.peek():
        line, _ = text.locate(text.position)
        raise DamagedFile(
            f"{text.name} line {line} goes on after the JSON array has ended: write one array, or one object a line."
        )


def read_values(text: "JsonText") -> Iterator[Numbered]:
    while text.peek():
        yield text.read_row()


class JsonText:
    """The text of a JSON file from where it was read up to, as much of it as its next row needs."""

    def __init__(self, stream: io.BufferedReader, name: str, whole: str, line: int, head: bytes = b"") -> None:
        self.stream = stream
        self.name = name
        self.whole = whole  # what the file ends in the middle of where it was cut off
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # so that bad bytes mar only their row
        self.text = self.decoder.decode(head)
        self.line = line  # on which the text begins, from 1
        self.column = 0  # characters of that line before the text
        self.position = 0
        self.num_rows = 0
        self.ended = False

    def peek(self) -> str:
        """Go to the next character that is not white space, and return it; an empty text at the end."""
        while True:
            white = WHITE.match(self.text, self.position)
            self.position = white.end() if white else self.position
            if self.position < len(self.text) or not self.fill():
                return self.text[self.position : self.position + 1]

    def skip(self) -> None:
        """Go past the next character that is not white space."""
        self.peek()
        self.position += 1

    def read_row(self) -> Numbered:
        """The next value. Raises DamagedFile where there is none."""
        self.peek()
        while True:
            failure = None
            try:
                row, end = decode_value(self.text, self.position)
            except json.JSONDecodeError as error:
                row, end, failure = None, len(self.text) if is_in_string(error) else error.pos, error
            if end <= len(self.text) - LONGEST_TOKEN or not self.fill():
                break
        if failure:
            raise self.damage(failure)
        source = self.text[self.position : end]
        self.position = end
        self.num_rows += 1
        return self.num_rows, row if is_utf8(source) else BadRow("is not UTF-8 text"), len(source)

    def fill(self) -> bool:
        """Read more, at least as much as is left, so that a long row is not parsed over and over; False at the end."""
        if self.ended:
            return False
        self.line, self.column = self.locate(self.position)
        self.text, self.position = self.text[self.position :], 0
        pieces, size = [self.text], 0
        while not self.ended and size <= len(self.text):
            data = self.stream.read1(READ_BYTES)
            self.ended = not data
            pieces.append(self.decoder.decode(data, self.ended))
            size += len(pieces[-1])
        self.text = "".join(pieces)
        return True

    def locate(self, position: int) -> tuple[int, int]:
        """The line of a position, from 1, and how many characters are before it on that line."""
        lines = self.text.count("\n", 0, position)
        start = self.text.rfind("\n", 0, position) + 1
        return self.line + lines, position - start + (0 if lines else self.column)

    def damage(self, error: json.JSONDecodeError) -> DamagedFile:
        if is_cut(error):
            place = f"after row {self.num_rows}" if self.num_rows else "before its first row"
            return DamagedFile(
                f"{self.name} ends in the middle of {self.whole}, {place}: it was cut off; upload it again."
            )
        line, column = self.locate(error.pos)
        rule = error.msg.removesuffix(" at")
        return DamagedFile(
            f"{self.name} line {line} is not valid JSON ({rule} at column {column + 1}): mend or remove it."
        )


class JsonDecoder(json.JSONDecoder):
    """Python's, except that every value it cannot take is a JSONDecodeError or a DuplicateKey."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except (json.JSONDecodeError, DuplicateKey):
            raise
        except ValueError as error:  # Python's guard against numbers of over 4,300 digits
            raise json.JSONDecodeError("Too long a number", s, idx) from error
        except RecursionError as error:
            raise json.JSONDecodeError("Too many brackets in brackets", s, idx) from error


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKey(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return fields


ROW_DECODER = JsonDecoder(object_pairs_hook=refuse_duplicates)
ANY_DECODER = JsonDecoder()


def parse_json(text: str | bytes) -> Any:
    """The value of one JSON text, with or without a byte order mark.

    Raises JSONDecodeError, UnicodeDecodeError or DuplicateKey, all of them a ValueError.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return ROW_DECODER.decode(text.removeprefix("\ufeff"))


def decode_value(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins at a position, and the position after it. Raises JSONDecodeError."""
    try:
        return ROW_DECODER.raw_decode(text, position)
    except DuplicateKey as error:
        return BadRow(str(error)), ANY_DECODER.raw_decode(text, position)[1]


def is_cut(error: json.JSONDecodeError) -> bool:
    """Whether nothing is wrong with a JSON text but that it ends too early."""
    rest = error.doc[error.pos :]
    if error.msg == r"Invalid \uXXXX escape":
        return len(rest) < len("uXXXX")
    return is_in_string(error) or any(word.startswith(rest) for word in LITERALS)


def is_in_string(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string")


def is_utf8(text: str) -> bool:
    """Whether a text that was decoded with surrogateescape has no byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
