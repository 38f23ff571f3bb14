# SPDX-License-Identifier: Apache-2.0
"""Reading of WebDataset's tar shards: members with one key are a row, its images among them.

The key of `train/0001.left.jpg` is `train/0001`, up to the first dot of the file's own name. The members of a key may
stand apart. Images stay where they are: the row has their place in the shard.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from llm_trainer.readers.json import find_double, parse_json
from llm_trainer.readers.rows import IMAGE_COLUMNS, MAX_ROW_BYTES, PLACEHOLDER, TOO_LONG, BadRow, FilePart, Numbered

TEXT_FIELD = "text"  # of a member .txt
TEXT_SUFFIXES = ("json", "txt")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SKIPPED = ("__key__", "__url__", "cls", "key")  # members that other programs add to a row
READ_BYTES = 2**20
UNREADABLE = (tarfile.TarError, OSError, ValueError, OverflowError)  # a shard that is cut off, damaged, or made to harm

Member = tuple[str, tarfile.TarInfo]  # suffix without a dot in lower case, entry


def read_tar(file: Path, name: str) -> Iterator[Numbered]:
    """Yield the rows of a shard, in the order of their first members. Raises UNREADABLE where it is damaged."""
    groups, damage = group_members(file)
    has_images = any(is_image(suffix) for group in groups.values() for suffix, _ in group)
    with file.open("rb") as shard:
        for number, (key, group) in enumerate(groups.items(), start=1):
            length = sum(entry.size for suffix, entry in group if find_kind(suffix) in TEXT_SUFFIXES)
            row: Any = BadRow(TOO_LONG) if length > MAX_ROW_BYTES else find_problem(key, group)
            yield number, row or build_row(shard, group, file, name, has_images), length
    if damage:
        raise damage


def group_members(file: Path) -> tuple[dict[str, list[Member]], Exception | None]:
    """Return the members of each key, wherever they stand, and what keeps the shard from being read to its end."""
    groups: dict[str, list[Member]] = {}
    try:
        with tarfile.open(file, mode="r:") as shard:
            for entry in shard:
                if shard.offset <= entry.offset:  # by a size below zero, and tarfile would read it again for ever
                    raise tarfile.ReadError("a member that ends before it begins")
                if found := split_name(entry):
                    key, suffix = found
                    groups.setdefault(key, []).append((suffix, entry))
            check_end(file, shard.offset)
    except MemoryError:
        return groups, tarfile.ReadError("a header that no memory holds")
    except UNREADABLE as error:
        return groups, error
    return groups, None


def find_problem(key: str, group: list[Member]) -> BadRow | None:
    """Return why members make no row: one is no file, two have one name, or nothing says what to make of an image."""
    if odd := [entry.name for _, entry in group if not entry.isreg() or entry.issparse()]:
        return BadRow(f"has the member {odd[0]}, a link or a file with holes where the file itself has to be")
    if (double := find_double([suffix for suffix, _ in group])) is not None:
        return BadRow(f"has two members {key}.{double}")
    if all(is_image(suffix) for suffix, _ in group):
        return BadRow(f"has the image {group[0][1].name} and no member .json or .txt beside it")
    return None


def find_kind(suffix: str) -> str:
    """Return the last part of a suffix such as `left.jpg`, which says what a member holds."""
    return suffix.rpartition(".")[2]


def is_image(suffix: str) -> bool:
    """Tell whether a member with this suffix is an image."""
    return find_kind(suffix) in IMAGE_SUFFIXES


def check_end(file: Path, offset: int) -> None:
    """Raise tarfile.ReadError where a shard does not end in zeros: tarfile notices no cut within a header.

    Nor does it read a second shard behind the first.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no mark of its end")
        while piece := stream.read(READ_BYTES):
            if piece.strip(b"\0"):
                raise tarfile.ReadError("more behind the mark of its end")


def split_name(entry: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return a member's key and suffix; None for one that is a folder, is hidden, or has no suffix."""
    path = PurePosixPath(entry.name)
    stem, dot, suffix = path.name.partition(".")
    if entry.isdir() or not (stem and dot):
        return None
    return str(path.parent / stem), suffix.lower()


def build_row(
    shard: IO[bytes], members: list[Member], file: Path, name: str, has_images: bool
) -> dict[str, Any] | BadRow:
    """Return the row of members with one key; a BadRow where a text among them cannot be read.

    In a shard that `has_images`, so is a text with a placeholder and no image.
    """
    row: dict[str, Any] = {}
    images: list[FilePart] = []
    waits = False  # for an image
    for suffix, entry in members:
        if is_image(suffix):
            images.append(FilePart(file, entry.offset_data, entry.size, f"{name}:{entry.name}"))
        elif (kind := find_kind(suffix)) in TEXT_SUFFIXES:
            try:
                data = read_member(shard, entry)
                row = join_fields(row, parse_text(data, kind))
            except ValueError as error:
                return BadRow(f"has a member {entry.name} that cannot be read ({error})")
            waits |= PLACEHOLDER.encode() in data
        elif kind not in SKIPPED:
            row[f".{suffix}"] = f"{entry.size} bytes"  # so that the member is told as a field that nothing reads
    if images:
        return place_images(row, images)
    if waits and has_images and row.keys().isdisjoint(IMAGE_COLUMNS):
        return BadRow(f"has the text {PLACEHOLDER} in {members[0][1].name} and no image beside it")
    return row


def place_images(row: dict[str, Any], images: list[FilePart]) -> dict[str, Any] | BadRow:
    """Return a row with the images of its key in place of their names, which a member .json often has, too."""
    names = [own for column in IMAGE_COLUMNS if (own := row.get(column))]
    num_names = sum(len(own) if isinstance(own, list) else 1 for own in names)
    if num_names not in (0, len(images)):
        return BadRow(f"names {num_names} images and has {len(images)} beside its text")
    rest = {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
    return {**rest, IMAGE_COLUMNS[0]: images}


def read_member(shard: IO[bytes], entry: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member. Raises tarfile.ReadError where the shard ends before it does."""
    shard.seek(entry.offset_data)
    data = shard.read(entry.size)
    if len(data) < entry.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def parse_text(data: bytes, kind: str) -> dict[str, Any]:
    """Return the fields that a member .json or .txt gives its row. Raises ValueError for what is not one."""
    if kind == "txt":
        return {TEXT_FIELD: data.decode("utf-8")}
    fields = parse_json(data)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return fields


def join_fields(row: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of two members. Raises ValueError where both have one, as with two rows of one key."""
    if (double := find_double([*row, *fields])) is not None:
        raise ValueError(f"another member has the field {double!r}, too")
    return row | fields
