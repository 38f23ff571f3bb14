# SPDX-License-Identifier: Apache-2.0
"""Reading of WebDataset's tar shards: consecutive members with one key are a row, its images among them.

The key of `train/0001.left.jpg` is `train/0001`, up to the first dot of the file's own name. Images stay where they
are: the row has their place in the shard.
"""

import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from llm_trainer.readers.json import parse_json
from llm_trainer.readers.rows import MAX_ROW_BYTES, TOO_LONG, BadRow, FilePart, Numbered

TEXT_FIELD = "text"  # of a member .txt
IMAGES_FIELD = "images"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SKIPPED = ("__key__", "__url__", "cls", "key")  # members that other programs add to a row

Member = tuple[str, str, tarfile.TarInfo]  # key, suffix without a dot in lower case, entry


def read_tar(file: Path, name: str) -> Iterator[Numbered]:
    """Yield the rows of a shard. Raises tarfile.TarError where the shard is damaged."""
    with tarfile.open(file, mode="r:") as shard:
        members = filter(None, map(split_member, shard))
        for number, (_, group) in enumerate(groupby(members, key=lambda member: member[0]), start=1):
            row = build_row(shard, list(group), file, name)
            yield number, row, 0 if isinstance(row, BadRow) else sum(map(len, filter(is_text, row.values())))
        check_end(file, shard.offset)


def check_end(file: Path, offset: int) -> None:
    """Raise tarfile.ReadError where no block of zeros ends a shard: tarfile does not notice a cut within a header."""
    with file.open("rb") as stream:
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no mark of its end")


def is_text(value: Any) -> bool:
    """Tell whether a value of a row is a text, whose length counts."""
    return isinstance(value, str)


def split_member(entry: tarfile.TarInfo) -> Member | None:
    """Return a member's key and suffix; None for one that is no regular file, is hidden, or has no suffix."""
    path = PurePosixPath(entry.name)
    stem, dot, suffix = path.name.partition(".")
    if not (entry.isreg() and stem and dot):
        return None
    return str(path.parent / stem), suffix.lower(), entry


def build_row(shard: tarfile.TarFile, members: Iterable[Member], file: Path, name: str) -> dict[str, Any] | BadRow:
    """Return the row of members with one key; a BadRow where a text among them cannot be read."""
    row: dict[str, Any] = {}
    images: list[FilePart] = []
    for _, suffix, entry in members:
        kind = suffix.rpartition(".")[2]
        if kind in IMAGE_SUFFIXES:
            images.append(FilePart(file, entry.offset_data, entry.size, f"{name}:{entry.name}"))
        elif kind in ("json", "txt"):
            if entry.size > MAX_ROW_BYTES:
                return BadRow(TOO_LONG)
            try:
                row |= read_text(shard, entry, kind)
            except (ValueError, UnicodeDecodeError) as error:
                return BadRow(f"has a member {entry.name} that cannot be read ({error})")
        elif kind not in SKIPPED:
            row[suffix] = f"{entry.size} bytes"  # so that the field is told as one that nothing reads
    return {**row, IMAGES_FIELD: images} if images else row


def read_text(shard: tarfile.TarFile, entry: tarfile.TarInfo, kind: str) -> dict[str, Any]:
    """Return the fields that a member .json or .txt gives its row. Raises ValueError for what is not one."""
    content = shard.extractfile(entry)
    assert content is not None  # it is a regular file
    data = content.read()
    if kind == "txt":
        return {TEXT_FIELD: data.decode("utf-8")}
    fields = parse_json(data)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return fields
