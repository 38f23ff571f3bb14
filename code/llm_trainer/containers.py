# SPDX-License-Identifier: Apache-2.0
"""Files of a channel -> raw rows, whatever container they are in. No tokenizer, no torch."""

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_trainer.errors import UserError, summarize

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv")
SUFFIXES = (".parquet", ".arrow", *(suffix + codec for suffix in TEXT_SUFFIXES for codec in ("", ".gz", ".zst")))
# Files that Hugging Face keeps beside .arrow files, or about a data set. A state.json is one only beside such files.
NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "cache-*.arrow", "*.lock")
NOT_WORTH_TELLING = (*NOT_ROWS, "README*", "LICENSE*", "*.md", "_SUCCESS")

MAX_BYTES = 4 * 2**20  # of raw rows in a chunk
READ_BYTES = 2**20  # of a JSON array at a time
BUFFER_BYTES = 2**16  # of a file
PIECE_BYTES = 2**14  # of uncompressed content
MAX_CELL = 64 * 2**20  # characters of a CSV cell: where a quote is never closed, the rest of the file would be one cell
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
LONGEST_TOKEN = 16  # characters: -Infinity, or an escaped surrogate pair, may be split between two reads

BOM = codecs.BOM_UTF8
WHITE = re.compile(r"[ \t\n\r]*")
MAGIC = {".gz": re.compile(rb"\x1f\x8b"), ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}
CODECS = {".gz": "gzip", ".zst": "zstd"}
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"

# What reading raises: the system, gzip, zstd and Arrow; the last two of these, a value that Python has no type for.
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, OverflowError)

Numbered = tuple[int, Any, int]  # a row's number, the row, and about how many bytes it is


class DamagedFile(Exception):  # noqa: N818 (it is the file that is damaged)
    """A file cannot be read to its end. Its text is the sentence for the user."""


class DuplicateKey(ValueError):  # noqa: N818 (it is the key that is there twice)
    """A JSON object has a key twice, so that one of the two values would be lost."""


@dataclass(frozen=True)
class BadRow:
    """A row that is unusable while those around it can be read."""

    reason: str  # what goes after the row's place in a sentence: "has the key 'text' twice"


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    A row of a .jsonl file is still its bytes, so that it can be parsed in another process.
    """

    file: str  # the file's name relative to the channel's folder, for messages
    numbers: list[int]  # each row's number: the line of a .jsonl file, else counted from 1
    rows: list[Any]  # bytes: one JSON text, not yet parsed; anything else: the row itself, or a BadRow


def find_files(path: Path, splits: tuple[str, ...] = ()) -> list[Path]:
    """The data files that a path means: itself, or those in the folder and below, by path. Hidden ones do not count.

    Of a saved DatasetDict only the first of the splits that is there. Raises UserError where none is, and where
    a saved Dataset lacks one of its files.
    """
    if path.is_file():
        return [path]
    found = list_files(choose_split(path, splits))
    shards = {file.parent: find_shards(file) for file in found if is_state(file)}
    return [
        file
        for file in found
        if file.name.endswith(SUFFIXES) and not is_about_rows(file) and file in shards.get(file.parent, [file])
    ]


def find_ignored(path: Path) -> list[str]:
    """Names of the files in a folder and below that are not read, but for those that nobody would expect to be."""
    files = list_files(path) if path.is_dir() else []
    return [
        file.relative_to(path).as_posix()
        for file in files
        if not file.name.endswith(SUFFIXES) and not any(fnmatch(file.name, known) for known in NOT_WORTH_TELLING)
    ]


def list_files(folder: Path) -> list[Path]:
    """Files that are not hidden. A link to nowhere is one, so that reading it tells that data is missing."""
    return sorted(
        file
        for file in folder.rglob("*")
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def is_about_rows(file: Path) -> bool:
    return is_state(file) or any(fnmatch(file.name, pattern) for pattern in NOT_ROWS)


def is_state(file: Path) -> bool:
    """Whether the file is the state.json of a folder that Dataset.save_to_disk wrote."""
    return file.name == "state.json" and (
        file.with_name("dataset_info.json").is_file() or any(file.parent.glob("*.arrow"))
    )


def choose_split(path: Path, splits: tuple[str, ...]) -> Path:
    """The folder to read: the path, or of a saved DatasetDict one split's."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        return path
    saved = read_index(index)
    for split in splits:
        if split in saved:
            return path / split
    raise UserError(
        f"{path} holds the splits {', '.join(saved)} and none that was looked for ({', '.join(splits) or 'none'}): "
        "give the folder of one split."
    )


def find_shards(state: Path) -> list[Path]:
    """The .arrow files of a saved Dataset."""
    shards = [state.with_name(name) for name in read_index(state)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{state} names {missing[0]}, which is not there: upload all files of the saved dataset.")
    return shards


def read_index(index: Path) -> list[str]:
    """The names of the splits or .arrow files that save_to_disk wrote."""
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        return saved["splits"] if "splits" in saved else [entry["filename"] for entry in saved["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not what save_to_disk writes ({error!r}): save the dataset again.") from error


def read_chunks(file: Path, name: str, max_rows: int, max_bytes: int = MAX_BYTES) -> Iterator[Chunk]:
    """The file's rows in order, at most max_rows and little more than max_bytes of them at a time.

    Raises DamagedFile, after the rows that could be read, where the file cannot be read to its end.
    """
    numbers: list[int] = []
    rows: list[Any] = []
    size = 0
    place = "before its first row"
    damage: DamagedFile | None = None
    try:
        for number, row, length in read_rows(file, name, max_rows, max_bytes):
            numbers.append(number)
            rows.append(row)
            size += length
            if len(rows) >= max_rows or size >= max_bytes:
                yield Chunk(name, numbers, rows)
                place = describe_end(numbers, rows)
                numbers, rows, size = [], [], 0
    except DamagedFile as error:
        damage = error
    except UNREADABLE as error:
        damage = DamagedFile(explain(error, file, name, describe_end(numbers, rows) if rows else place))
    if rows:
        yield Chunk(name, numbers, rows)
    if damage:
        raise damage


def describe_end(numbers: list[int], rows: list[Any]) -> str:
    return f"after {'line' if isinstance(rows[-1], bytes) else 'row'} {numbers[-1]}"


def explain(error: Exception, file: Path, name: str, place: str) -> str:
    """The sentence for the user about an error of the system or of a library."""
    if isinstance(error, EOFError) or str(error) == "Truncated compressed stream":
        codec = CODECS[file.suffix]
        return f"{name} ends in the middle of its {codec} stream ({place}): it was cut off; upload it again."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be read {place} ({os.strerror(error.errno)}): check that it is there and readable."
    return f"{name} is damaged {place} ({summarize(error)}): upload it again, or write it again."


def read_rows(file: Path, name: str, max_rows: int, max_bytes: int) -> Iterator[Numbered]:
    container = Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix
    if container == ".parquet":
        yield from read_table(read_parquet(file, max_rows, max_bytes), name, max_rows, max_bytes)
    elif container == ".arrow":
        yield from read_table(read_arrow(file, name), name, max_rows, max_bytes)
    else:
        with open_stream(file, name) as stream:
            if stream.peek(len(BOM)).startswith(BOM):
                stream.read(len(BOM))
            is_json_lines = container in (".jsonl", ".ndjson")
            yield from read_csv(stream, name) if container == ".csv" else read_json(stream, name, is_json_lines)


@contextmanager
def open_stream(file: Path, name: str) -> Iterator[io.BufferedReader]:
    """The file's content, uncompressed, read once from its beginning to its end."""
    raw: io.BufferedReader = io.BufferedReader(io.FileIO(file), BUFFER_BYTES)
    with raw:
        codec = CODECS.get(file.suffix)
        if codec is None:
            yield raw
            return
        head = raw.peek(4)
        if head and not MAGIC[file.suffix].match(head):
            raise DamagedFile(
                f"{name} is not a {codec} file: compress it, or name it {name.removesuffix(file.suffix)}."
            )
        content: Any = gzip.GzipFile(fileobj=raw) if codec == "gzip" else pa.CompressedInputStream(raw, codec)
        yield io.BufferedReader(Uncompressed(content), BUFFER_BYTES)


class Uncompressed(io.RawIOBase):
    """What a decompressor gives, a little at a time, because what it gave in a call that then failed is lost."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.content.read1(min(len(buffer), PIECE_BYTES))
        buffer[: len(data)] = data
        return len(data)


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
    if goes_on(head):
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


def goes_on(head: bytes) -> bool:
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
                row, end = decode(self.text, self.position)
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


def decode(text: str, position: int) -> tuple[Any, int]:
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


def read_csv(stream: io.BufferedReader, name: str) -> Iterator[Numbered]:
    csv.field_size_limit(MAX_CELL)
    table = csv.reader(decode_lines(stream, name), strict=True)
    number = 0
    try:
        header = next((cells for cells in table if ",".join(cells).strip()), [])
        check_columns(header, name)
        for number, cells in enumerate(filter(None, table), start=1):
            matches = len(cells) == len(header)
            row = dict(zip(header, cells, strict=True)) if matches else BadRow(count_cells(cells, header))
            yield number, row, sum(map(len, cells))
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            place = f"after row {number}" if number else "before its first row"
            raise DamagedFile(
                f"{name} ends in the middle of a quoted cell, {place}: close the quote, or upload the whole file."
            ) from error
        raise DamagedFile(f"{name} line {table.line_num} is not valid CSV ({error}): mend or remove it.") from error


def decode_lines(stream: io.BufferedReader, name: str) -> Iterator[str]:
    with io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, start=1):
            if not is_utf8(line):
                raise DamagedFile(f"{name} line {number} is not UTF-8 text: save it as UTF-8.")
            yield line


def count_cells(cells: list[str], header: list[str]) -> str:
    return f"has {len(cells)} cell{'s' * (len(cells) != 1)} and the header has {len(header)}"


def check_columns(names: list[str], file_name: str) -> None:
    """Raises DamagedFile where a column has no name, or that of another: its values would be lost."""
    for column, name in enumerate(names, start=1):
        if not name.strip():
            raise DamagedFile(f"{file_name} has no name for column {column}: name it, or remove it.")
        if names.count(name) > 1:
            raise DamagedFile(f"{file_name} has the column {name!r} twice: rename or remove one of them.")


def read_parquet(file: Path, max_rows: int, max_bytes: int) -> Iterator[Any]:
    """Record batches of little more than max_bytes, as far as the average of a row group tells."""
    with pq.ParquetFile(file, buffer_size=BUFFER_BYTES) as table:
        for index in range(table.num_row_groups):
            group = table.metadata.row_group(index)
            fitting = max_bytes * group.num_rows // max(1, group.total_byte_size)
            yield from table.iter_batches(max(1, min(max_rows, fitting)), row_groups=[index], use_threads=False)


def read_arrow(file: Path, name: str) -> Iterator[Any]:
    """Record batches of both of Arrow's containers: the stream, which save_to_disk writes, and the file."""
    with pa.memory_map(str(file)) as source:
        if source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
            table = pa.ipc.open_file(source)
            yield from (table.get_batch(index) for index in range(table.num_record_batches))
            return
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        source.seek(-len(ARROW_STREAM_END), io.SEEK_END)
        if source.read() != ARROW_STREAM_END:  # Arrow does not mind where the cut is between two batches
            raise DamagedFile(f"{name} ends without Arrow's mark of the end: it was cut off; upload it again.")


def read_table(batches: Iterator[Any], name: str, max_rows: int, max_bytes: int) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        if not number:
            check_columns(batch.schema.names, name)
        batch.validate(full=True)  # otherwise damaged offsets end the process
        for part in halve(batch, max_rows, max_bytes):
            length = part.nbytes // part.num_rows
            for fields in part.to_pylist():
                number += 1
                yield number, {key: drop_nested_nones(value) for key, value in fields.items()}, length


def halve(batch: Any, max_rows: int, max_bytes: int) -> Iterator[Any]:
    """The batch in parts that hold no more than this many rows and bytes, or one row."""
    if batch.num_rows <= max_rows and (batch.num_rows <= 1 or batch.nbytes <= max_bytes):
        if batch.num_rows:
            yield batch
        return
    middle = batch.num_rows // 2
    yield from halve(batch.slice(0, middle), max_rows, max_bytes)
    yield from halve(batch.slice(middle), max_rows, max_bytes)


def drop_nested_nones(value: Any) -> Any:
    """The value without the None fields that Arrow adds to objects so that all of a column's have the same fields."""
    if isinstance(value, dict):
        return {key: drop_nested_nones(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [drop_nested_nones(element) for element in value]
    return value
