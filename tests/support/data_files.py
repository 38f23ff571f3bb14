# SPDX-License-Identifier: Apache-2.0
"""Data files in every container for tests, and what comes out of them."""

import gzip
import json

import pyarrow as pa
import pytest

from llm_trainer.readers.files import read_chunks
from llm_trainer.readers.json import parse_json
from llm_trainer.readers.rows import DamagedFile

ROWS = [{"text": "a"}, {"text": "b\u00e9\U0001f600"}, {"text": "c", "n": [1, 2.5, None, True]}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def compress_gzip(content):
    return gzip.compress(content, mtime=0)  # without the time, because it goes into the ids of tests


def compress_zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_file(folder, name, content):
    file = folder / name
    file.write_bytes(content)
    return file


def read_rows(file, max_rows=2):
    """Numbers and rows; lines of bytes are parsed."""
    numbers, rows = [], []
    for chunk in read_chunks(file, file.name, max_rows):
        assert chunk.file == file.name
        assert 0 < len(chunk.rows) == len(chunk.numbers) <= max_rows
        numbers += chunk.numbers
        rows += [parse_json(row) if isinstance(row, bytes) else row for row in chunk.rows]
    return numbers, rows


def read_damaged(file):
    """The rows before the damage, and its sentence."""
    rows = []
    with pytest.raises(DamagedFile) as caught:
        for chunk in read_chunks(file, file.name, 2):
            rows += chunk.rows
    return rows, str(caught.value)


def write_arrow(new, file, rows, batch_rows=2):
    table = pa.Table.from_pylist(rows)
    with new(str(file), table.schema) as writer:
        for batch in table.to_batches(batch_rows):
            writer.write_batch(batch)
    return file
