# SPDX-License-Identifier: Apache-2.0
"""Rows as they stand in their files, before their format is known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A row becomes a hundred times its bytes in memory while it is tokenized, in each process.
MAX_ROW_BYTES = 16 * 2**20
TOO_LONG = f"is longer than {MAX_ROW_BYTES // 2**20} MiB"

Numbered = tuple[int, Any, int]  # a row's number, the row, and its approximate size in bytes


class DamagedFile(Exception):  # noqa: N818 (it is the file that is damaged)
    """Damage that keeps a file from being read to its end. Its text is the sentence for the user."""


@dataclass(frozen=True)
class BadRow:
    """A row that is unusable while its neighbours can be read."""

    reason: str  # the rest of a sentence that begins with the row's place, such as "has the key 'text' twice"


PLACEHOLDER = "<image>"  # of an image, in a text
IMAGE_COLUMNS = ("images", "image")  # of a row


@dataclass(frozen=True)
class FilePart:
    """Bytes of a file on disk, such as a member of a tar shard."""

    path: Path
    offset: int
    size: int
    name: str  # for messages


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    A row of a .jsonl file is its bytes, because another process parses it.
    """

    file: str  # the file's name relative to the channel's folder, for messages
    numbers: list[int]  # each row's number: the line of a .jsonl file, else counted from 1
    rows: list[Any]  # each is bytes (a JSON text that is not parsed yet), the parsed row, or a BadRow
    path: Path | None = None  # of the file, which names in its rows are relative to; None for rows of the Hub
