# SPDX-License-Identifier: Apache-2.0
"""A row as it stands in its file, before anybody knows what its fields mean."""

from dataclasses import dataclass
from typing import Any

Numbered = tuple[int, Any, int]  # a row's number, the row, and about how many bytes it is


class DamagedFile(Exception):  # noqa: N818 (it is the file that is damaged)
    """A file cannot be read to its end. Its text is the sentence for the user."""


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
