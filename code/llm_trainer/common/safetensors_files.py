# SPDX-License-Identifier: Apache-2.0
"""The weights of a model folder: which files Transformers loads, whether they are whole, and how large.

Only the headers of .safetensors files are read, and some bytes to tell models apart. Pickled weights are never read.

A file is 8 bytes with the header's length, the header, a JSON object of tensors, and the tensors' bytes.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.files import is_inner_path

SINGLE_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
# A folder with such a file is loaded by torch's distributed checkpointing, whatever else it holds.
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"  # how the names of its tensors end
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
NUM_SAMPLES, SAMPLE_BYTES = 32, 4096  # of a model's matrices: enough to tell a fine-tuned copy from its base


def list_weights(folder: Path) -> list[Path]:
    """Return the files that Transformers loads the weights of a folder from, sorted by name.

    Others beside them, such as `consolidated.safetensors`, hold the same weights for other programs.
    """
    with contextlib.suppress(ValueError):  # the check of the model tells of an index that cannot be read
        return sorted(folder / name for name in map_weights(folder) if (folder / name).is_file())
    return []


def map_weights(folder: Path) -> dict[str, set[str]]:
    """Return the tensors of each file that Transformers loads, as far as an index tells them.

    As Transformers does, take a single file before an index. Raises ValueError with what is wrong with the index.
    """
    tensors = read_index(folder / WEIGHTS_INDEX)
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: tensors.get(SINGLE_FILE, set())}
    return tensors


def find_unasked_weights(folder: Path, subject: str) -> Iterator[str]:
    """Yield sentences about files that Transformers would load unasked, on top of the weights or in their place."""
    adapter = folder / ADAPTER_CONFIG
    if adapter.is_file():
        yield describe_adapter(adapter, subject)
    shard = next((file.name for file in sorted(folder.glob("shard-*")) if DISTRIBUTED_SHARD.fullmatch(file.name)), None)
    if shard:
        yield f"{subject} holds {shard}, part of a distributed checkpoint, which would be loaded: remove its shards."
    with contextlib.suppress(ValueError):
        tensors = read_index(folder / WEIGHTS_INDEX)
        if tensors and SINGLE_FILE not in tensors and (folder / SINGLE_FILE).is_file():
            yield f"{subject} holds {SINGLE_FILE}, and {WEIGHTS_INDEX} names other files: remove one of the two."


def describe_adapter(adapter: Path, subject: str) -> str:
    """Return the sentence about an adapter's config where a base model is expected."""
    if (adapter.parent / "config.json").is_file():
        return (
            f"{subject} also holds an adapter ({ADAPTER_CONFIG}), which would be loaded with the base unasked: remove "
            "its files there, and give them as channel 'adapter' to go on from it."
        )
    try:
        base = read_json(adapter)["base_model_name_or_path"]
    except (UnreadableTextError, LookupError, TypeError):
        base = None
    named = f" of {base!r}" if isinstance(base, str) and base else ""
    return (
        f"{subject} holds an adapter{named} and no model ({ADAPTER_CONFIG} without config.json): give its base as the "
        "model, and the adapter as channel 'adapter' to go on from it."
    )


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
        described = read_json(header, "header", MAX_HEADER_BYTES)
        tensors = {name: tensor for name, tensor in described.items() if name != "__metadata__"}
        whole = 8 + header_bytes + max(map(find_end, tensors.values()), default=0)
    except (UnreadableTextError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError("has no header of the safetensors format: download the model again.") from error
    if size != whole:
        fault = "was cut off" if size < whole else "is damaged"
        raise ValueError(f"is {size:,} bytes of {whole:,}: it {fault}; download the model again.")
    return tensors


def find_end(tensor: dict[str, Any]) -> int:
    """Return where a tensor's bytes end. Raises ValueError for what no header says of a tensor."""
    start, end = tensor["data_offsets"]
    numbers = [start, end, *tensor["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(tensor["dtype"], str):
        raise ValueError("not a tensor")
    if start > end or math.prod(tensor["shape"]) > 8 * (end - start):  # no type has less than a bit a number
        raise ValueError("not a tensor's extent")
    return end


def check_weights(folder: Path) -> Iterator[str]:
    """Yield sentences on what is missing or damaged. A folder without any weights is for the caller to judge."""
    try:
        tensors = map_weights(folder)
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
        for tensor, file in read_json(index)["weight_map"].items():
            if not is_inner_path(file):
                raise ValueError(f"it names {file!r}, outside of the folder")
            tensors.setdefault(file, set()).add(tensor)
    except UnreadableTextError as error:
        raise ValueError(f"{index} {error.reason}: download the model again.") from error
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


def compute_sampled_digest(folder: Path) -> str | None:
    """Return a digest of some bytes from the middle of matrices all over a model, None where none can be read.

    Copies of a model have the same one, however their tensors are spread over files.
    """
    matrices: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in list_weights(folder):
        with contextlib.suppress(ValueError, OSError):  # the check of the model tells of a file that cannot be read
            header = read_header(file)
            matrices |= {name: (file, tensor) for name, tensor in header.items() if len(tensor["shape"]) > 1}
    names = sorted(matrices)
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names[:: math.ceil(len(names) / NUM_SAMPLES)]:
        file, tensor = matrices[name]
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
        digest.update(read_middle(file, *tensor["data_offsets"]))
    return digest.hexdigest()


def read_middle(file: Path, start: int, end: int) -> bytes:
    """Return some bytes from the middle of a tensor, which lies between these offsets behind the header."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + header_bytes + max(start, (start + end - SAMPLE_BYTES) // 2))
        return stream.read(min(SAMPLE_BYTES, end - start))
