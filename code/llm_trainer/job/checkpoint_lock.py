# SPDX-License-Identifier: Apache-2.0
"""A lock on the checkpoint folder: two jobs in one would delete each other's checkpoints, and both would die.

The kernel holds the lock for the launcher of the first host, and lets go when that process ends, however it ends. The
file tells only who holds it: one that S3 sends back after a spot interruption locks nothing.
"""

import atexit
import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.redaction import hide_in

LOCK = ".in-use.json"
MAX_BYTES = 4096
MAX_SECONDS = 2.0**32  # since the epoch, in the year 2106: others are no time of a job


def lock_checkpoints(folder: Path, host: str) -> None:
    """Lock a folder until this process ends. Raises UserError where another job holds the lock.

    A file system that knows no locks, such as Lustre without the option `flock`, is used without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    while True:
        stream = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(describe_use(folder)) from error
        except OSError as error:
            os.close(stream)
            log.info(f"{folder} is on a file system without locks ({quote_error(error)}): let no other job write there")
            return
        if is_same_file(stream, file):
            break
        os.close(stream)  # its holder has just ended, and removed it
    owner = {"job": os.environ.get("TRAINING_JOB_NAME"), "host": host, "process": os.getpid(), "since": time.time()}
    os.truncate(stream, 0)
    os.pwrite(stream, json.dumps(hide_in(owner)).encode() + b"\n", 0)
    atexit.register(release, file)


def find_other_job(folder: Path) -> str | None:
    """Return a sentence on the job that holds the lock of a folder; None where none does. Nothing is written."""
    try:
        stream = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return describe_use(folder)
    except OSError:
        return None  # a file system without locks
    finally:
        os.close(stream)
    return None


def is_same_file(stream: int, file: Path) -> bool:
    """Tell whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(stream), file.stat())
    except FileNotFoundError:
        return False


def release(file: Path) -> None:
    """Remove the file. The lock itself ends with the process."""
    with suppress(OSError):
        file.unlink()


def describe_use(folder: Path) -> str:
    """Return the sentence on a folder that another job writes to, by what that job's file tells."""
    owner = read_owner(folder / LOCK)
    name = f"job {owner['job']!r}" if owner.get("job") else "another job"
    seconds = owner.get("since")
    is_time = isinstance(seconds, float) and 0 <= seconds < MAX_SECONDS
    since = time.strftime(" since %Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if is_time else ""
    return (
        f"checkpoint_dir={str(folder)!r} is in use by {name} (host {owner.get('host', 'unknown')}, "
        f"process {owner.get('process', 'unknown')}){since}, and two jobs would delete each other's checkpoints: "
        "wait for its end, or give this job a checkpoint_dir of its own."
    )


def read_owner(file: Path) -> dict[str, Any]:
    """Return what a lock's file tells of its holder, and nothing where it cannot be read."""
    try:
        with file.open("rb") as stream:
            owner = read_json(stream.read(MAX_BYTES))
    except (OSError, UnreadableTextError):
        return {}
    return owner if isinstance(owner, dict) else {}
