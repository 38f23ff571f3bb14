# SPDX-License-Identifier: Apache-2.0
"""The checkpoint folder: whole checkpoints or none, whatever kills the job, and whichever files S3 sends back.

SageMaker uploads the folder while it is written, mirrors deletions, and hands it back after a spot interruption,
perhaps incomplete. A checkpoint is therefore written under another name, gets a list of its files with sizes and
digests, and is then renamed. Only one that still agrees with its list is resumed from. Where the model is sharded, each
host's folder holds what its ranks wrote, and the list names the files of all hosts.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.files import is_inner_path, remove_leftover, remove_path, write_verbatim
from llm_trainer.common.ranks import local_rank, local_world_size

Files = dict[str, tuple[int, str]]  # path below the checkpoint -> bytes, xxh3_64
Gather = Callable[[Any], list[Any]]  # takes this rank's object, returns those of all ranks in their order

PARTIAL = ".partial"  # beside the checkpoints, so that moving a finished one is a rename
MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Marker:
    """The content of complete.json, which makes a checkpoint a complete one."""

    step: int
    run: dict[str, Any]  # the identity of the run: one that goes on from here has the same
    num_tokens: int  # seen in training so far
    evaluation_due: bool  # the stop came between this step and its evaluation
    files: Files  # the files of all hosts


def find_partial_dir(folder: Path) -> Path:
    """Return the folder in which a checkpoint is written before it is complete."""
    return folder / PARTIAL


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a killed job left half written."""
    remove_leftover(find_partial_dir(folder))


def gather_alone(own: Any) -> list[Any]:
    """Gather over this rank alone."""
    return [own]


def select_own_share(names: list[str]) -> list[str]:
    """Return the names that this rank reads; the ranks of a host share the reading."""
    return names[local_rank() :: local_world_size()]


def list_files(folder: Path) -> list[str]:
    """List all files below the folder, by their path there."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def describe_files(folder: Path, names: list[str]) -> Files:
    """Return size and digest of each of these files."""
    return {name: describe_file(folder / name) for name in names}


def complete_checkpoint(
    partial: Path, run: dict[str, Any], num_tokens: int, evaluation_due: bool, files: Files
) -> Path:
    """Give a written checkpoint its marker and its final name. Return the folder under that name."""
    write_marker(partial, Marker(parse_step(partial), run, num_tokens, evaluation_due, files))
    return move_into_place(partial)


def write_marker(folder: Path, marker: Marker) -> None:
    """Write complete.json into a checkpoint that is not in place yet."""
    write_verbatim(folder / MARKER, json.dumps(asdict(marker)) + "\n")


def move_into_place(partial: Path) -> Path:
    """Rename a marked checkpoint to its final name; it takes the place of a broken one of that name."""
    final = partial.parent.parent / partial.name
    if final.exists() or final.is_symlink():
        replaced = partial.with_name(f"replaced-{partial.name}")
        final.rename(replaced)
        partial.rename(final)
        remove_path(replaced)
    else:
        partial.rename(final)
    return final


def describe_file(file: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its xxh3_64 digest in hexadecimal."""
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return file.stat().st_size, digest.hexdigest()


def parse_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name; -1 where the name is another."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """List the folders that bear a checkpoint's name, the newest first."""
    if not folder.is_dir():
        return []
    named = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(named, key=parse_step, reverse=True)


def list_over_hosts(folder: Path, gather: Gather) -> list[Path]:
    """List the checkpoints that any host has, the newest first."""
    found = {name for names in gather([checkpoint.name for checkpoint in list_checkpoints(folder)]) for name in names}
    return sorted((folder / name for name in found), key=parse_step, reverse=True)


def read_marker(checkpoint: Path) -> Marker | None:
    """Return the checkpoint's marker, or None where there is none that can be read.

    One that names files outside its checkpoint is none: hosts write the files that it names.
    """
    try:
        marker = Marker(**read_json(checkpoint / MARKER))
    except (UnreadableTextError, TypeError):  # TypeError: other fields than a marker's, or no object
        return None
    return marker if is_marker(marker) else None


def is_marker(marker: Marker) -> bool:
    """Tell whether the fields of a marker hold what they should, whoever wrote them."""
    numbers = (marker.step, marker.num_tokens)
    if not all(type(number) is int and number >= 0 for number in numbers) or type(marker.evaluation_due) is not bool:
        return False
    return isinstance(marker.run, dict) and isinstance(marker.files, dict) and all(map(is_file, marker.files.items()))


def is_file(entry: tuple[str, Any]) -> bool:
    """Tell whether an entry of a marker's files is a path inside of the checkpoint with a size and a digest."""
    name, described = entry
    if not is_inner_path(name) or not isinstance(described, list) or len(described) != 2:
        return False
    size, digest = described
    return type(size) is int and size >= 0 and isinstance(digest, str)


def agree_on_marker(checkpoint: Path, gather: Gather) -> Marker | None:
    """Return the marker of the first host that has one. Every rank must call this."""
    markers: list[Marker | None] = gather(read_marker(checkpoint) if local_rank() == 0 else None)
    return next((marker for marker in markers if marker is not None), None)


def find_file_faults(checkpoint: Path, marker: Marker) -> dict[str, str | None]:
    """Return file -> fault, None for a sound one, for this rank's share of the files."""
    return {
        name: find_file_fault(checkpoint, name, *marker.files[name]) for name in select_own_share(sorted(marker.files))
    }


def find_file_fault(checkpoint: Path, name: str, size: int, digest: str) -> str | None:
    """Return how a file differs from what its checkpoint's marker says of it; None where it agrees."""
    if fault := find_size_fault(checkpoint, name, size):
        return fault
    return None if describe_file(checkpoint / name) == (size, digest) else f"{name} is damaged"


def find_size_fault(checkpoint: Path, name: str, size: int) -> str | None:
    """Return whether a file is missing or of another size than its checkpoint's marker says; None where it agrees."""
    file = checkpoint / name
    if not file.is_file():
        return f"{name} is missing"
    return None if file.stat().st_size == size else f"{name} has {file.stat().st_size} of {size} bytes"


def find_fault(checkpoint: Path, gather: Gather = gather_alone) -> str | None:
    """Return why a checkpoint is not complete, such as "optimizer.pt is missing"; None for a complete one.

    A file may be on any of the hosts. Every rank must call this.
    """
    marker = agree_on_marker(checkpoint, gather)
    if marker is None:
        return f"it has no readable {MARKER}"
    surveys = gather(find_file_faults(checkpoint, marker))
    for name in sorted(marker.files):
        faults = [survey[name] for survey in surveys if name in survey]
        if None not in faults:
            return max(faults, key=lambda fault: not fault.endswith("is missing"))
    return None


def find_newest(folder: Path, gather: Gather = gather_alone) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint, and a warning for every newer one that is not complete."""
    warnings: list[str] = []
    for checkpoint in list_over_hosts(folder, gather):
        fault = find_fault(checkpoint, gather)
        if fault is None:
            return checkpoint, warnings
        warnings.append(f"Warning: {checkpoint} is left out, {fault}: the one before it is used, if there is one.")
    return None, warnings


def rotate_checkpoints(newest: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest of our checkpoints until `limit` are left; never the newest, never the best.

    Only complete ones count. A broken one, and one of a later step that this run went back from, must not push out a
    good one.
    """
    if limit is None:
        return
    complete_ones = [
        checkpoint
        for checkpoint in list_checkpoints(newest.parent)
        if parse_step(checkpoint) <= parse_step(newest) and read_marker(checkpoint) is not None
    ]
    kept = {newest, best} & set(complete_ones)
    for checkpoint in complete_ones:  # the newest first
        if checkpoint in kept:
            continue
        if len(kept) < limit:
            kept.add(checkpoint)
        else:
            # Renamed first: a deletion that is cut short must not leave half a checkpoint under a whole one's name.
            doomed = find_partial_dir(newest.parent) / f"deleted-{checkpoint.name}"
            doomed.parent.mkdir(exist_ok=True)
            checkpoint.rename(doomed)
            remove_path(doomed)
