# SPDX-License-Identifier: Apache-2.0
"""Reading of CSV, Parquet and Arrow files as rows, a bounded number of bytes at a time."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_trainer.readers.json import find_double, is_utf8
from llm_trainer.readers.rows import BadRow, DamagedFile, Numbered

BUFFER_BYTES = 2**16  # buffer of an open Parquet file
MAX_CELL = 64 * 2**20  # characters of a CSV cell: without it, a quote that stays open makes one cell of the rest
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def read_csv(stream: io.BufferedReader, name: str) -> Iterator[Numbered]:
    """Yield the rows below the header as objects of texts. Raises DamagedFile where the file is not valid CSV."""
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
    """Yield the rows of record batches. Raises DamagedFile where two columns have one name."""
    number = 0
    for batch in batches:
        if not number:
            check_columns(batch.schema.names, name)
        batch.validate(full=True)  # without this check, damaged offsets crash the process
        for part in split_batch(batch, max_rows, max_bytes):
            length = part.nbytes // part.num_rows
            for fields in part.to_pylist():
                number += 1
                yield number, {key: drop_nested_nones(value) for key, value in fields.items()}, length


def split_batch(batch: Any, max_rows: int, max_bytes: int) -> Iterator[Any]:
    """Yield a batch in parts of at most that many rows and bytes, or of one row."""
    if batch.num_rows <= max_rows and (batch.num_rows <= 1 or batch.nbytes <= max_bytes):
        if batch.num_rows:
            yield batch
        return
    middle = batch.num_rows // 2
    yield from split_batch(batch.slice(0, middle), max_rows, max_bytes)
    yield from split_batch(batch.slice(middle), max_rows, max_bytes)


def drop_nested_nones(value: Any) -> Any:
    """Return a value without the None fields that Arrow adds to nested objects, which all have a column's fields."""
    if isinstance(value, dict):
        return {key: drop_nested_nones(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [drop_nested_nones(element) for element in value]
    return value
