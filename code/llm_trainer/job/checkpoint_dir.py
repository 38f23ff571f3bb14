# SPDX-License-Identifier: Apache-2.0
"""The checkpoint folder: whole checkpoints or none, whatever kills the job, and whatever of them S3 sends back.

SageMaker uploads the folder while it is written, mirrors deletions, and hands it back after a spot interruption,
perhaps half. So a checkpoint is written under another name, gets a list of its files with sizes and digests, and is
then renamed; only one that still agrees with its list is resumed from. Where the model is sharded, each host's folder
holds what its ranks wrote, and the list names the files of all hosts. Nothing here needs torch.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from llm_trainer.common.ranks import local_rank, local_world_size

Files = dict[str, tuple[int, str]]  # path below the checkpoint -> bytes, xxh3_64
Gather = Callable[[Any], list[Any]]  # what each rank gives -> what all gave, in the order of the ranks

PARTIAL = ".partial"  # beside the checkpoints, so that moving a finished one is a rename
MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Marker:
    """What a complete checkpoint says of itself."""

    step: int
    run: dict[str, Any]  # what a run that goes on from here has to share with the one that wrote it
    num_tokens: int  # seen in training so far
    evaluation_due: bool  # the stop came between this step and its evaluation
    files: Files  # of all hosts


def find_partial_dir(folder: Path) -> Path:
    """Where a checkpoint is written to before it is complete."""
    return folder / PARTIAL


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a killed job left half written."""
    shutil.rmtree(find_partial_dir(folder), ignore_errors=True)


def gather_alone(own: Any) -> list[Any]:
    """The `Gather` of a rank that asks no other."""
    return [own]


def select_own_share(names: list[str]) -> list[str]:
    """Those that this rank reads; the ranks of a host share the reading."""
    return names[local_rank() :: local_world_size()]


def list_files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def describe_files(folder: Path, names: list[str]) -> Files:
    return {name: describe_file(folder / name) for name in names}


def complete_checkpoint(
    partial: Path, run: dict[str, Any], num_tokens: int, evaluation_due: bool, files: Files
) -> Path:
    """Give the written checkpoint its marker and its final name; the folder under that name."""
    write_marker(partial, Marker(parse_step(partial), run, num_tokens, evaluation_due, files))
    return move_into_place(partial)


def write_marker(folder: Path, marker: Marker) -> None:
    (folder / MARKER).write_text(json.dumps(asdict(marker)) + "\n", encoding="utf-8")


def move_into_place(partial: Path) -> Path:
    """Rename a marked checkpoint to its final name, in the place of a broken one of that name."""
    final = partial.parent.parent / partial.name
    if final.exists():
        replaced = partial.with_name(f"replaced-{partial.name}")
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
    return final


def describe_file(file: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return file.stat().st_size, digest.hexdigest()


def parse_step(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Those that bear the name of one, the newest first."""
    if not folder.is_dir():
        return []
    named = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(named, key=parse_step, reverse=True)


def list_over_hosts(folder: Path, gather: Gather) -> list[Path]:
    """Those that any host has, the newest first."""
    found = {name for names in gather([checkpoint.name for checkpoint in list_checkpoints(folder)]) for name in names}
    return sorted((folder / name for name in found), key=parse_step, reverse=True)


def read_marker(checkpoint: Path) -> Marker | None:
    """The checkpoint's marker, or None where there is none that can be read."""
    try:
        return Marker(**json.loads((checkpoint / MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def agree_on_marker(checkpoint: Path, gather: Gather) -> Marker | None:
    """The marker of the first host that has one."""
    markers: list[Marker | None] = gather(read_marker(checkpoint) if local_rank() == 0 else None)
    return next((marker for marker in markers if marker is not None), None)


def find_file_faults(checkpoint: Path, marker: Marker) -> dict[str, str | None]:
    """File -> what is wrong with it here, or None; for this rank's share of the files."""
    return {
        name: find_file_fault(checkpoint, name, *marker.files[name]) for name in select_own_share(sorted(marker.files))
    }


def find_file_fault(checkpoint: Path, name: str, size: int, digest: str) -> str | None:
    file = checkpoint / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} of {size} bytes"
    return None if describe_file(file) == (size, digest) else f"{name} is damaged"


def find_fault(checkpoint: Path, gather: Gather = gather_alone) -> str | None:
    """What keeps a checkpoint from being complete, e.g. "optimizer.pt is cut short"; None for a complete one.

    A file may be on any of the hosts.
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
    """The newest complete checkpoint, and a warning for every newer one that is not complete."""
    warnings: list[str] = []
    for checkpoint in list_over_hosts(folder, gather):
        fault = find_fault(checkpoint, gather)
        if fault is None:
            return checkpoint, warnings
        warnings.append(f"Warning: {checkpoint} is left out, {fault}: the one before it is used, if there is one.")
    return None, warnings


def rotate_checkpoints(newest: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest of our checkpoints until `limit` are left; never the newest, never the best.

    Only complete ones count. A broken one counts for nothing, and neither does a later step that this run went back
    from: neither may push out a good one.
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
            shutil.rmtree(doomed)
