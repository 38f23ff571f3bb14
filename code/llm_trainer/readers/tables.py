# SPDX-License-Identifier: Apache-2.0
"""Reading of CSV, TSV, Parquet and Arrow files as rows, a bounded number of bytes at a time."""

import csv
import io
from collections.abc import Callable, Iterator
from datetime import datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_trainer.readers.json import find_double, is_utf8, parse_json, refuse_duplicates
from llm_trainer.readers.rows import BadRow, DamagedFile, Numbered

BUFFER_BYTES = 2**16  # buffer of an open Parquet file
MAX_CELL = 64 * 2**20  # characters of a CSV cell: without it, a quote that stays open makes one cell of the rest
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"

Convert = Callable[[Any], Any]  # from the value that pyarrow makes of a cell to the value that JSON has in its place


def read_csv(stream: io.BufferedReader, name: str, separator: str) -> Iterator[Numbered]:
    """Yield the rows below the header as objects of texts. Raises DamagedFile where the file is not valid CSV."""
    csv.field_size_limit(MAX_CELL)
    table = csv.reader(decode_lines(stream, name), strict=True, delimiter=separator)
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
    """Yield the lines as text, with their line breaks. Raises DamagedFile at a line that is not UTF-8 or has no end."""
    with io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_CELL), ""), start=1):
            if len(line) >= MAX_CELL:
                raise DamagedFile(f"{name} line {number} is longer than {MAX_CELL // 2**20} MiB: mend or remove it.")
            if not is_utf8(line):
                raise DamagedFile(f"{name} line {number} is not UTF-8 text: save it as UTF-8.")
            yield line


def count_cells(cells: list[str], header: list[str]) -> str:
    """Return the reason why a row with more or fewer cells than the header is bad."""
    return f"has {len(cells)} cell{'s' * (len(cells) != 1)} and the header has {len(header)}"


def check_columns(names: list[str], file_name: str) -> None:
    """Raise DamagedFile where a column has no name, or the name of another: its values would be lost."""
    for column, name in enumerate(names, start=1):
        if not name.strip():
            raise DamagedFile(f"{file_name} has no name for column {column}: name it, or remove it.")
    if (double := find_double(names)) is not None:
        raise DamagedFile(f"{file_name} has the column {double!r} twice: rename or remove one of them.")


def read_parquet(file: Path, max_rows: int, max_bytes: int) -> Iterator[Any]:
    """Yield record batches of at most `max_rows` rows and about `max_bytes`, by the average of each row group."""
    with pq.ParquetFile(file, buffer_size=BUFFER_BYTES) as table:
        for index in range(table.num_row_groups):
            group = table.metadata.row_group(index)
            fitting = max_bytes * group.num_rows // max(1, group.total_byte_size)
            yield from table.iter_batches(max(1, min(max_rows, fitting)), row_groups=[index], use_threads=False)


def read_arrow(file: Path, name: str) -> Iterator[Any]:
    """Yield the record batches of either of Arrow's containers: the stream, which save_to_disk writes, or the file.

    Raises DamagedFile where a stream has no mark of its end.
    """
    with pa.memory_map(str(file)) as source:
        if source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
            table = pa.ipc.open_file(source)
            yield from (table.get_batch(index) for index in range(table.num_record_batches))
            return
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        source.seek(-len(ARROW_STREAM_END), io.SEEK_END)
        if source.read() != ARROW_STREAM_END:  # Arrow does not notice a cut between two batches
            raise DamagedFile(f"{name} ends without Arrow's mark of the end: it was cut off; upload it again.")


def read_table(batches: Iterator[Any], name: str, max_rows: int, max_bytes: int) -> Iterator[Numbered]:
    """Yield the rows of record batches, as JSON would have them. Raises DamagedFile where two columns have one name."""
    number = 0
    for batch in batches:
        if not number:
            check_columns(batch.schema.names, name)
        converters = {column.name: find_converter(column.type) for column in batch.schema}
        batch.validate(full=True)  # without this check, damaged offsets crash the process
        for part in split_batch(batch, max_rows, max_bytes):
            length = part.nbytes // part.num_rows
            for fields in part.to_pylist():
                number += 1
                yield number, convert_row(fields, converters), length


def split_batch(batch: Any, max_rows: int, max_bytes: int) -> Iterator[Any]:
    """Yield a batch in parts of at most that many rows and bytes, or of one row."""
    if batch.num_rows <= max_rows and (batch.num_rows <= 1 or batch.nbytes <= max_bytes):
        if batch.num_rows:
            yield batch
        return
    middle = batch.num_rows // 2
    yield from split_batch(batch.slice(0, middle), max_rows, max_bytes)
    yield from split_batch(batch.slice(middle), max_rows, max_bytes)


def convert_row(fields: dict[str, Any], converters: dict[str, Convert | None]) -> dict[str, Any] | BadRow:
    """Return a row as JSON would have it; a BadRow where a cell has a key twice, or is not the JSON that it says."""
    for name, convert in converters.items():
        if convert and fields[name] is not None:
            try:
                fields[name] = convert(fields[name])
            except ValueError as error:
                return BadRow(f"has a column {name!r} that cannot be read ({error})")
    return fields


def find_converter(kind: Any) -> Convert | None:
    """Return the function that makes JSON's value of a cell of an Arrow type; None where pyarrow makes it."""
    types = pa.types
    if types.is_struct(kind):
        return convert_struct({field.name: find_converter(field.type) for field in kind})
    if types.is_map(kind):
        return convert_map(find_converter(kind.item_type))
    if any(is_list(kind) for is_list in LISTS):
        return convert_list(find_converter(kind.value_type))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return find_converter(kind.value_type)
    return next((convert for is_kind, convert in CONVERTERS if is_kind(kind)), None)


def convert_struct(fields: dict[str, Convert | None]) -> Convert | None:
    """Return the converter of objects with these fields; None where no field needs one."""
    needed = {name: convert for name, convert in fields.items() if convert}

    def convert_fields(value: dict[str, Any]) -> dict[str, Any]:
        converted = {name: convert(value[name]) for name, convert in needed.items() if value[name] is not None}
        return value | converted

    return convert_fields if needed else None


def convert_list(convert: Convert | None) -> Convert | None:
    """Return the converter of lists whose elements have this one; None where elements need none."""
    if convert is None:
        return None
    return lambda values: [None if value is None else convert(value) for value in values]


def convert_map(convert: Convert | None) -> Convert:
    """Return the converter of maps, which pyarrow gives as pairs, to objects. It raises DuplicateKey."""

    def convert_pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        return refuse_duplicates(
            [(str(key), convert(value) if convert and value is not None else value) for key, value in pairs]
        )

    return convert_pairs


def convert_decimal(value: Decimal) -> int | float:
    """Return a decimal as a number of JSON, whole where it has no fraction."""
    return int(value) if value == value.to_integral_value() else float(value)


def convert_time(value: datetime) -> str:
    """Return a time as text; at midnight without a zone the day alone, since pandas and others read a day as a time."""
    is_day = value.tzinfo is None and value.time() == time()
    return (value.date() if is_day else value).isoformat()


def convert_binary(value: bytes) -> str | bytes:
    """Return bytes as the text that they are, since old writers of Parquet mark no text; other bytes as they are."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
# JSON has no dates: they become texts of ISO 8601. An interval or duration stays what it is, and is refused if used.
CONVERTERS: tuple[tuple[Callable[[Any], bool], Convert], ...] = (
    (lambda kind: isinstance(kind, pa.JsonType), parse_json),
    (lambda kind: isinstance(kind, pa.UuidType), str),
    (lambda kind: pa.types.is_date(kind) or pa.types.is_time(kind), lambda value: value.isoformat()),
    (pa.types.is_timestamp, convert_time),
    (pa.types.is_decimal, convert_decimal),
    (lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind), convert_binary),
    (lambda kind: pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind), convert_binary),
)
