# SPDX-License-Identifier: Apache-2.0
"""The .safetensors files of a model folder: whether they are whole, and how large. Only their headers are read.

A file is 8 bytes with the header's length, the header, a JSON object of tensors, and the tensors' bytes.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS_INDEX = "model.safetensors.index.json"
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"  # how the names of its tensors end
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def list_weights(folder: Path) -> list[Path]:
    """Return the .safetensors files of a folder, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def is_git_lfs_pointer(file: Path) -> bool:
    """Tell whether `git clone` left a pointer in the place of the file, for want of Git LFS."""
    with file.open("rb") as stream:
        return stream.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER


def read_header(file: Path) -> dict[str, Any]:
    """Return dtype, shape and offsets by tensor. Raises ValueError with what is wrong with the file."""
    if is_git_lfs_pointer(file):
        raise ValueError("is a Git LFS pointer and not the weights: run `git lfs pull`, or download the model again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = stream.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
    if size < 8 or (header_bytes <= MAX_HEADER_BYTES and len(header) < header_bytes):
        raise ValueError(f"ends after {size:,} bytes, within its header: it was cut off; download the model again.")
    try:
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        whole = 8 + header_bytes + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError("has no header of the safetensors format: download the model again.") from error
    if size != whole:
        fault = "was cut off" if size < whole else "is damaged"
        raise ValueError(f"is {size:,} bytes of {whole:,}: it {fault}; download the model again.")
    return tensors


def check_weights(folder: Path) -> Iterator[str]:
    """Yield sentences on what is missing or damaged. A folder without any weights is for the caller to judge."""
    try:
        tensors = read_index(folder / WEIGHTS_INDEX) or {file.name: set() for file in list_weights(folder)}
    except ValueError as error:
        yield str(error)
        return
    missing = sorted(name for name in tensors if not (folder / name).is_file())
    if missing:
        yield f"Model folder {folder} lacks {len(missing)} weight files of its index, first {missing[0]}: add them."
    for name in sorted(tensors.keys() - missing):
        try:
            absent = sorted(tensors[name] - read_header(folder / name).keys())
        except ValueError as error:
            yield f"{folder / name} {error}"
            continue
        if absent:
            yield (
                f"{folder / name} lacks {len(absent)} tensors that {WEIGHTS_INDEX} says it holds, first {absent[0]}: "
                "download the model again."
            )


def read_index(index: Path) -> dict[str, set[str]]:
    """Return the tensors of an index by file, nothing where there is none. Raises ValueError with what is wrong."""
    if not index.is_file():
        return {}
    tensors: dict[str, set[str]] = {}
    try:
        for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            tensors.setdefault(file, set()).add(tensor)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a weights index ({error!r}): download the model again.") from error
    return tensors


def list_shapes(folder: Path) -> list[list[int]]:
    """Return the shape of every tensor in the readable files. MXFP4 blocks count as the numbers that they hold."""
    shapes = []
    for file in list_weights(folder):
        with contextlib.suppress(ValueError, OSError):  # the check of the model tells of a file that cannot be read
            tensors = read_header(file)
            shapes += [
                unpack_shape(tensor["shape"]) if name.endswith(MXFP4_BLOCKS) else tensor["shape"]
                for name, tensor in tensors.items()
                if not (name.endswith(MXFP4_SCALES) and name.removesuffix(MXFP4_SCALES) + MXFP4_BLOCKS in tensors)
            ]
    return shapes


def count_weights(folder: Path) -> int:
    """Return how many numbers the readable files hold."""
    return sum(map(math.prod, list_shapes(folder)))


def unpack_shape(shape: list[int]) -> list[int]:
    """Return the [..., columns] numbers in MXFP4 blocks of [..., groups, bytes]: a byte holds two (OCP MX 1.0)."""
    *rows, groups, size_bytes = shape
    return [*rows, 2 * groups * size_bytes]
