# SPDX-License-Identifier: Apache-2.0
"""Reading of WebDataset's tar shards: members with one key are a row, its images among them.

The key of `train/0001.left.jpg` is `train/0001`, up to the first dot of the file's own name. The members of a key may
stand apart. Images stay where they are: the row has their place in the shard.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llm_trainer.readers.json import find_double, parse_json
from llm_trainer.readers.rows import MAX_ROW_BYTES, PLACEHOLDER, TOO_LONG, BadRow, FilePart, Numbered

TEXT_FIELD = "text"  # of a member .txt
IMAGES_FIELD = "images"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SKIPPED = ("__key__", "__url__", "cls", "key")  # members that other programs add to a row

Member = tuple[str, tarfile.TarInfo]  # suffix without a dot in lower case, entry


def read_tar(file: Path, name: str) -> Iterator[Numbered]:
    """Yield the rows of a shard, in the order of their first members. Raises tarfile.TarError where it is damaged."""
    with tarfile.open(file, mode="r:") as shard:
        groups, damage = group_members(file, shard)
        has_images = any(is_image(suffix) for group in groups.values() for suffix, _ in group)
        for number, (key, group) in enumerate(groups.items(), start=1):
            row = find_problem(key, group) or build_row(shard, group, file, name, has_images)
            yield number, row, 0 if isinstance(row, BadRow) else sum(map(len, filter(is_text, row.values())))
    if damage:
        raise damage


def group_members(file: Path, shard: tarfile.TarFile) -> tuple[dict[str, list[Member]], tarfile.TarError | None]:
    """Return the members of each key, wherever they stand, and what keeps the shard from being read to its end."""
    groups: dict[str, list[Member]] = {}
    try:
        for entry in shard:
            if found := split_name(entry):
                key, suffix = found
                groups.setdefault(key, []).append((suffix, entry))
        check_end(file, shard.offset)
    except tarfile.TarError as error:
        return groups, error
    return groups, None


def find_problem(key: str, group: list[Member]) -> BadRow | None:
    """Return why members make no row: two have one name, or nothing says what to make of an image."""
    if (double := find_double([suffix for suffix, _ in group])) is not None:
        return BadRow(f"has two members {key}.{double}")
    if all(is_image(suffix) for suffix, _ in group):
        return BadRow(f"has the image {group[0][1].name} and no member .json or .txt beside it")
    return None


def is_image(suffix: str) -> bool:
    """Tell whether a member with this suffix is an image."""
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def check_end(file: Path, offset: int) -> None:
    """Raise tarfile.ReadError where no block of zeros ends a shard: tarfile does not notice a cut within a header."""
    with file.open("rb") as stream:
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no mark of its end")


def is_text(value: Any) -> bool:
    """Tell whether a value of a row is a text, whose length counts."""
    return isinstance(value, str)


def split_name(entry: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return a member's key and suffix; None for one that is no regular file, is hidden, or has no suffix."""
    path = PurePosixPath(entry.name)
    stem, dot, suffix = path.name.partition(".")
    if not (entry.isreg() and stem and dot):
        return None
    return str(path.parent / stem), suffix.lower()


def build_row(
    shard: tarfile.TarFile, members: list[Member], file: Path, name: str, has_images: bool
) -> dict[str, Any] | BadRow:
    """Return the row of members with one key; a BadRow where a text among them cannot be read.

    In a shard that `has_images`, so is a text with a placeholder and no image.
    """
    row: dict[str, Any] = {}
    images: list[FilePart] = []
    waits = False  # for an image
    for suffix, entry in members:
        kind = suffix.rpartition(".")[2]
        if is_image(suffix):
            images.append(FilePart(file, entry.offset_data, entry.size, f"{name}:{entry.name}"))
        elif kind in ("json", "txt"):
            try:
                data = read_member(shard, entry)
                row |= parse_text(data, kind)
            except (ValueError, UnicodeDecodeError) as error:
                return BadRow(f"has a member {entry.name} that cannot be read ({error})")
            waits |= PLACEHOLDER.encode() in data
        elif kind not in SKIPPED:
            row[suffix] = f"{entry.size} bytes"  # so that the field is told as one that nothing reads
    if waits and has_images and not images and IMAGES_FIELD not in row:
        return BadRow(f"has the text {PLACEHOLDER} in {members[0][1].name} and no image beside it")
    return {**row, IMAGES_FIELD: images} if images else row


def read_member(shard: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member. Raises ValueError where it is too long for a row."""
    if entry.size > MAX_ROW_BYTES:
        raise ValueError(TOO_LONG)
    content = shard.extractfile(entry)
    assert content is not None  # it is a regular file
    return content.read()


def parse_text(data: bytes, kind: str) -> dict[str, Any]:
    """Return the fields that a member .json or .txt gives its row. Raises ValueError for what is not one."""
    if kind == "txt":
        return {TEXT_FIELD: data.decode("utf-8")}
    fields = parse_json(data)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return fields
