# SPDX-License-Identifier: Apache-2.0
"""A trial of the folders that a job will write to: only a file that is written tells whether one can be.

Permissions alone do not: root may write anywhere but on a read-only mount, a full quota takes no file, and a link may
lead nowhere.
"""

import errno
import os
import tempfile
from pathlib import Path

from llm_trainer.common.files import find_barrier
from llm_trainer.host.free_space import describe_lack, find_nearest_folder

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def find_write_problem(folder: Path) -> str | None:
    """Return the end of a sentence on why no file can be written to a folder, None where one can.

    A folder that is not made yet is tried by the nearest one above it. The file is flushed to the disk and removed.
    """
    if barrier := find_barrier(folder):
        return explain_refusal(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), barrier)
    if problem := find_obstacle(folder):
        return problem
    nearest = find_nearest_folder(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".llm-trainer-probe-") as file:
            file.write(bytes(1))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return explain_refusal(error, nearest)
    return None


def find_obstacle(folder: Path) -> str | None:
    """Return the end of a sentence where a file or a link to nowhere stands in a folder's path; else None."""
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            return (
                f"{place} is a link to {os.readlink(place)}, which is not there: remove the link, or make its target."
            )
        if place.exists():
            return None if place.is_dir() else f"{place} is a file: give a folder."
    return None


def explain_refusal(error: OSError, folder: Path) -> str:
    """Return the end of a sentence on why a folder took no file."""
    if error.errno == errno.EROFS:
        return f"{folder} is on a read-only file system: mount it writable."
    if error.errno in NO_ROOM:
        return f"a trial write {describe_lack(folder, over_quota=error.errno == errno.EDQUOT)}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"user {os.getuid()} cannot write to {folder}: mount it writable, or run as another user."
    return f"{folder} takes no file ({error.strerror}): give a folder on a disk that works."


def find_temp_problem() -> str | None:
    """Return a sentence where no folder for temporary files can be written; None where one can."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        return (
            f"no folder for temporary files takes one ({error.strerror}): mount a writable /tmp with room in it, or "
            "set TMPDIR to one."
        )
    return None
