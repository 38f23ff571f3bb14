# SPDX-License-Identifier: Apache-2.0
"""Reading of a data file in any container, as chunks of raw rows."""

import codecs
import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm_trainer.common.errors import quote_error
from llm_trainer.readers.json import read_json
from llm_trainer.readers.rows import MAX_ROW_BYTES, TOO_LONG, BadRow, Chunk, DamagedFile, Numbered
from llm_trainer.readers.tables import read_arrow, read_csv, read_parquet, read_table
from llm_trainer.readers.tar_shards import read_tar

MAX_BYTES = 4 * 2**20  # raw rows in a chunk
SEPARATORS = {".csv": ",", ".tsv": "\t"}  # of the cells in a line
BUFFER_BYTES = 2**16  # buffer of an open file
PIECE_BYTES = 2**14  # uncompressed content that is asked for at a time

BOM = codecs.BOM_UTF8
MAGIC = {".gz": re.compile(rb"\x1f\x8b"), ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}
CODECS = {".gz": "gzip", ".zst": "zstd"}

# Errors of reading by the system, gzip, zstd, tar and Arrow. The last two are also a value that has no Python type.
UNREADABLE = (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException, ValueError, OverflowError)


def read_chunks(file: Path, name: str, max_rows: int, max_bytes: int = MAX_BYTES) -> Iterator[Chunk]:
    """Yield the file's rows in order, in chunks of at most `max_rows` rows and little more than `max_bytes`.

    Raises DamagedFile, after the rows before the damage, where the file cannot be read to its end.
    """
    numbers: list[int] = []
    rows: list[Any] = []
    size = 0
    place = "before its first row"
    damage: DamagedFile | None = None
    try:
        for number, row, length in read_rows(file, name, max_rows, max_bytes):
            numbers.append(number)
            rows.append(row if length <= MAX_ROW_BYTES else BadRow(TOO_LONG))
            size += length
            if len(rows) >= max_rows or size >= max_bytes:
                yield Chunk(name, numbers, rows, file)
                place = describe_end(numbers, rows)
                numbers, rows, size = [], [], 0
    except DamagedFile as error:
        damage = error
    except UNREADABLE as error:
        damage = DamagedFile(explain_damage(error, file, name, describe_end(numbers, rows) if rows else place))
    if rows:
        yield Chunk(name, numbers, rows, file)
    if damage:
        raise damage


def describe_end(numbers: list[int], rows: list[Any]) -> str:
    """Return the place of a chunk's last row, as the end of a sentence."""
    return f"after {'line' if isinstance(rows[-1], bytes) else 'row'} {numbers[-1]}"


def explain_damage(error: Exception, file: Path, name: str, place: str) -> str:
    """Return the sentence for the user about an error of the system or of a library."""
    if isinstance(error, EOFError) or str(error) == "Truncated compressed stream":
        codec = CODECS[file.suffix]
        return f"{name} ends in the middle of its {codec} stream ({place}): it was cut off; upload it again."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be read {place} ({os.strerror(error.errno)}): check that it is there and readable."
    return f"{name} is damaged {place} ({quote_error(error)}): upload it again, or write it again."


def read_rows(file: Path, name: str, max_rows: int, max_bytes: int) -> Iterator[Numbered]:
    """Yield the file's rows in order, with the reader that its suffix chooses. Raises DamagedFile and UNREADABLE."""
    container = Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix
    if container == ".parquet":
        yield from read_table(read_parquet(file, max_rows, max_bytes), name, max_rows, max_bytes)
    elif container in (".arrow", ".feather"):
        yield from read_table(read_arrow(file, name), name, max_rows, max_bytes)
    elif container == ".tar":
        refuse_compressed(file, name)
        yield from read_tar(file, name)
    else:
        with open_stream(file, name) as stream:
            if stream.peek(len(BOM)).startswith(BOM):
                stream.read(len(BOM))
            if container in SEPARATORS:
                yield from read_csv(stream, name, SEPARATORS[container])
            else:
                yield from read_json(stream, name, container in (".jsonl", ".ndjson"))


def refuse_compressed(file: Path, name: str) -> None:
    """Raise DamagedFile for a shard that is compressed, whose images have no place of their own in the file."""
    with file.open("rb") as stream:
        head = stream.read(4)
    codec = next((CODECS[suffix] for suffix, magic in MAGIC.items() if magic.match(head)), None)
    if codec:
        raise DamagedFile(f"{name} is compressed by {codec}, and a shard is read in place: unpack it to a .tar file.")


@contextmanager
def open_stream(file: Path, name: str) -> Iterator[io.BufferedReader]:
    """Open a file's uncompressed content, to be read once from its beginning to its end.

    Raises DamagedFile where a file is not compressed as its name says.
    """
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
    """Stream of decompressed bytes, read a little at a time: a call that fails loses the bytes before the fault."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def readable(self) -> bool:
        """Return true, as io.BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with at most PIECE_BYTES, and return their number; 0 at the end."""
        data = self.content.read1(min(len(buffer), PIECE_BYTES))
        buffer[: len(data)] = data
        return len(data)
