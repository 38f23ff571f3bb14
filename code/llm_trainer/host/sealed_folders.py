# SPDX-License-Identifier: Apache-2.0
"""Cache folders that are trusted only for a reason: private to this user, sealed with checksums, locked while in use.

Another user of the machine cannot write into a private folder. Checksums find what a crash or a disk has damaged. A
lock keeps the folder of a running job from being removed to make room.
"""

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from llm_trainer.common import log
from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import remove_path, write_verbatim
from llm_trainer.host.free_space import find_nearest_folder
from llm_trainer.host.write_probe import explain_refusal

SEAL = "seal.json"  # the folder's label, and the checksum of each of its files


def make_private_folder(folder: Path) -> Path:
    """Return the folder, made if it is missing; where others could write to it, warn and return a new one beside it.

    Raises UserError where the folder above it takes none.
    """
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        if is_private(folder):
            return folder
        substitute = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    except OSError as error:
        place = find_nearest_folder(folder.parent)
        raise UserError(f"Caches cannot be kept: {explain_refusal(error, place)}") from error
    log.warning(f"{folder} could be written by others, so its caches are not used. This job's go to {substitute}.")
    return substitute


def is_private(folder: Path) -> bool:
    """Tell whether a path is a folder of this user that nobody else may write to, and no link."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not is_writable


def seal_folder(folder: Path, label: str) -> None:
    """Write the label and the checksums of a folder's files beside them, and bring all of it to the disk."""
    sums = {file.name: compute_checksum(file) for file in sorted(folder.iterdir())}
    write_verbatim(folder / SEAL, json.dumps({"label": label, "checksums": sums}))
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path, label: str) -> str:
    """Return why a folder is not to be trusted, as the rest of a sentence; empty where it is as it was sealed."""
    if not is_private(folder):
        return "could be written by others"
    try:
        seal: Any = read_json(folder / SEAL)
        if seal["label"] != label:
            return "belongs to other data"
        damaged = [name for name, checksum in seal["checksums"].items() if compute_checksum(folder / name) != checksum]
    except (UnreadableTextError, OSError, KeyError, TypeError, AttributeError):
        return "is not whole"
    return f"has a damaged {damaged[0]}" if damaged else ""


def compute_checksum(file: Path) -> str:
    """Return the checksum of a file's content. It finds damage, not malice, several times quicker than a digest."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def hold_folder(folder: Path) -> None:
    """Keep a folder from being removed by `remove_oldest`, until this process ends. A missing folder is no error."""
    with suppress(OSError):  # a disk without locks: there nothing is removed either
        # Never closed, because the lock ends with the descriptor.
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH)


def remove_oldest(parent: Path, max_bytes: int) -> None:
    """Remove the folders that were used longest ago and that nobody holds, until the others have so many bytes at most.

    Unfinished folders, whose names begin with a dot, go in any case.
    """
    folders = [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]
    sizes = {folder: measure_folder(folder) for folder in folders}
    kept = sum(sizes.values())
    for folder in sorted(folders, key=lambda folder: (not folder.name.startswith("."), read_time(folder))):
        if kept > max_bytes or folder.name.startswith("."):
            with lock_if_unused(folder) as is_unused:
                if is_unused:
                    remove_path(folder)
                    kept -= sizes[folder]


def measure_folder(folder: Path) -> int:
    """Return the bytes of a folder's files; one that is removed meanwhile counts 0."""
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            with suppress(OSError):
                total += file.stat().st_size
    return total


def read_time(folder: Path) -> float:
    """Return when a folder was last used, in seconds since the epoch; 0 where it is gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0


@contextmanager
def lock_if_unused(folder: Path) -> Iterator[bool]:
    """Give true and lock the folder while the block runs, where no process holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_unused = True
        except OSError:
            is_unused = False
        yield is_unused
    finally:
        os.close(descriptor)
