# SPDX-License-Identifier: Apache-2.0
"""Reading of JSON files as rows: an object a line, or one array, without holding the whole file."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from llm_trainer.common.bounded_parsing import MAX_DEPTH, TOO_DEEP, is_too_deep
from llm_trainer.readers.rows import MAX_ROW_BYTES, TOO_LONG, BadRow, DamagedFile, Numbered

READ_BYTES = 2**20  # part of a JSON array that is read at a time
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
LONGEST_TOKEN = 16  # characters: two reads may split -Infinity, or an escaped surrogate pair
WHITE = re.compile(r"[ \t\n\r]*")


class DuplicateKey(ValueError):  # noqa: N818 (it names the key that is there twice)
    """Error for a JSON object that has a key twice, since one of the two values would be lost."""


class TooDeep(ValueError):  # noqa: N818 (it names what is too deep)
    """Error for a row whose lists and objects nest so deeply that a program that walks it may fail."""


def read_json(stream: io.BufferedReader, name: str, is_json_lines: bool) -> Iterator[Numbered]:
    """Yield the rows of a JSON array, or of a JSON text a line, as the content shows.

    Objects over several lines are read too, unless the file's name promises one a line: there each line is a row.
    Raises DamagedFile.
    """
    line = 1 + skip_white(stream)
    if stream.peek(1).startswith(b"["):
        yield from read_array(JsonText(stream, name, "its JSON array", line))
        return
    if is_json_lines:
        yield from read_lines(stream, line)
        return
    head = stream.readline(MAX_ROW_BYTES)
    if starts_long_json(head):
        yield from read_values(JsonText(stream, name, "a JSON object", line, head))
    else:
        yield from read_lines(stream, line, head)


def skip_white(stream: io.BufferedReader) -> int:
    """Skip white space, and return the number of line breaks in it."""
    lines = 0
    while head := stream.peek(1):
        text = head.lstrip()
        white = stream.read(len(head) - len(text))
        lines += white.count(b"\n")
        if text:
            break
    return lines


def starts_long_json(head: bytes) -> bool:
    """Tell whether a file's first line only begins a JSON text, or holds several: neither one whole nor broken."""
    try:
        parse_json(head)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data" or is_cut(error)
    except ValueError:
        return False
    return False


def read_lines(stream: io.BufferedReader, first: int, head: bytes = b"") -> Iterator[Numbered]:
    """Yield the lines that are not empty as bytes, and a BadRow for each that is too long.

    `first` is the number of the first line, and `head` what was read of it before.
    """
    for number in itertools.count(first):
        line = head or stream.readline(MAX_ROW_BYTES)
        head = b""
        if not line:
            return
        if len(line) >= MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, BadRow(TOO_LONG), 0
        elif not line.isspace():
            yield number, line, len(line)


def read_array(text: "JsonText") -> Iterator[Numbered]:
    """Yield the elements of a JSON array. Raises DamagedFile where it is cut, not valid, or not the whole text."""
    text.skip_character()
    if text.peek() != "]":
        yield text.read_row()
        while text.peek() == ",":
            text.skip_character()
            yield text.read_row()
    if text.peek() != "]":
        raise text.build_damage(json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position))
    text.skip_character()
    if text.peek():
        line, _ = text.locate(text.position)
        raise DamagedFile(
            f"{text.name} line {line} goes on after the JSON array has ended: write one array, or one object a line."
        )


def read_values(text: "JsonText") -> Iterator[Numbered]:
    """Yield JSON values that follow one another. Raises DamagedFile where one is cut or not valid."""
    while text.peek():
        yield text.read_row()


class JsonText:
    """Window on the text of a JSON file: the part that is not parsed yet, as long as the next row needs."""

    def __init__(self, stream: io.BufferedReader, name: str, whole: str, line: int, head: bytes = b"") -> None:
        self.stream = stream
        self.name = name
        self.whole = whole  # the word for the unit that a cut-off file ends in, such as "JSON array"
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bad bytes spoil only their row
        self.text = self.decoder.decode(head)
        self.line = line  # the line on which the text begins, from 1
        self.column = 0  # characters before the text on that line
        self.position = 0
        self.num_rows = 0
        self.ended = False

    def peek(self) -> str:
        """Move to the next character that is not white space, and return it; an empty text at the end."""
        while True:
            white = WHITE.match(self.text, self.position)
            self.position = white.end() if white else self.position
            if self.position < len(self.text) or not self.read_more():
                return self.text[self.position : self.position + 1]

    def skip_character(self) -> None:
        """Move past the next character that is not white space."""
        self.peek()
        self.position += 1

    def read_row(self) -> Numbered:
        """Return the next value as a row. Raises DamagedFile where there is none."""
        self.peek()
        while True:
            failure = None
            try:
                row, end = decode_value(self.text, self.position)
            except json.JSONDecodeError as error:
                row, end, failure = None, len(self.text) if is_in_string(error) else error.pos, error
            if end <= len(self.text) - LONGEST_TOKEN:
                break
            if len(self.text) - self.position > 2 * MAX_ROW_BYTES:
                raise DamagedFile(f"{self.name} row {self.num_rows + 1} {TOO_LONG}: split or remove it.")
            if not self.read_more():
                break
        if failure:
            raise self.build_damage(failure)
        source = self.text[self.position : end]
        self.position = end
        self.num_rows += 1
        return self.num_rows, row if is_utf8(source) else BadRow("is not UTF-8 text"), len(source)

    def read_more(self) -> bool:
        """Read more text, and return whether there was any.

        The text at least doubles, because a long row is parsed anew each time.
        """
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
        """Return the line of a position, from 1, and the number of characters before it on that line."""
        lines = self.text.count("\n", 0, position)
        start = self.text.rfind("\n", 0, position) + 1
        return self.line + lines, position - start + (0 if lines else self.column)

    def build_damage(self, error: json.JSONDecodeError) -> DamagedFile:
        """Return the error for the user where the text is cut or not valid."""
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
    """Python's decoder, which raises JSONDecodeError or DuplicateKey for every value that it cannot take."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return the value that begins at an index, and the index after it."""
        try:
            return super().raw_decode(s, idx)
        except (json.JSONDecodeError, DuplicateKey):
            raise
        except ValueError as error:  # Python refuses numbers of over 4,300 digits
            raise json.JSONDecodeError("Too long a number", s, idx) from error
        except RecursionError as error:
            raise json.JSONDecodeError("Too many brackets in brackets", s, idx) from error


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's fields. Raises DuplicateKey where two have one key."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise DuplicateKey(f"has the key {find_double(key for key, _ in pairs)!r} twice")
    return fields


def find_double(names: Iterable[str]) -> str | None:
    """Return the first name that was there before; None where each is there once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


ROW_DECODER = JsonDecoder(object_pairs_hook=refuse_duplicates)
ANY_DECODER = JsonDecoder()


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON text, with or without a byte order mark.

    Raises JSONDecodeError, UnicodeDecodeError, DuplicateKey or TooDeep, all of them a ValueError.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    value = ROW_DECODER.decode(text.removeprefix("\ufeff"))
    if may_be_deep(text, 0, len(text)) and is_too_deep(value):
        raise TooDeep(TOO_DEEP)
    return value


def may_be_deep(text: str, start: int, end: int) -> bool:
    """Tell whether a part of a text has enough brackets to nest too deeply: counting them is quicker than a walk."""
    return text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH


def decode_value(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a position, or a BadRow in its place, and the position after it.

    A key that is there twice makes a BadRow, and so does a value that nests too deeply. Raises JSONDecodeError.
    """
    try:
        value, end = ROW_DECODER.raw_decode(text, position)
        return BadRow(TOO_DEEP) if may_be_deep(text, position, end) and is_too_deep(value) else value, end
    except DuplicateKey as error:
        return BadRow(str(error)), ANY_DECODER.raw_decode(text, position)[1]


def is_cut(error: json.JSONDecodeError) -> bool:
    """Tell whether a JSON text is valid as far as it goes, and ends too early."""
    rest = error.doc[error.pos :]
    if error.msg == r"Invalid \uXXXX escape":
        return len(rest) < len("uXXXX")
    return is_in_string(error) or any(word.startswith(rest) for word in LITERALS)


def is_in_string(error: json.JSONDecodeError) -> bool:
    """Tell whether a JSON text ends within a string."""
    return error.msg.startswith("Unterminated string")


def is_utf8(text: str) -> bool:
    """Tell whether the bytes of a text that was decoded with surrogateescape are all UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
