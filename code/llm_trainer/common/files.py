# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, their digests, their removal, and JSON files of one object.

Whether this process's user may read a file is asked before it is opened. A container may run as any user
(`docker run --user`), and files keep the owner and the mode of where they were made. Root without its rights, or on
another machine's file system, is a user like any other.
"""

import hashlib
import json
import os
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError
from llm_trainer.common.redaction import hide_in, hide_known, hide_secrets


@contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Give a path beside the file to write to, which takes the file's place when the block ends.

    Where the block fails, the file stays as it was, and the unfinished one is removed.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(file: Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 text file for people, whole or not at all, without secrets.

    `errors` says what becomes of characters that UTF-8 cannot hold.
    """
    write_verbatim(file, hide_secrets(text), errors)


def write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, whole or not at all, without secrets."""
    write_verbatim(file, json.dumps(hide_in(value), indent=indent) + "\n")


def write_verbatim(file: Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 text file whole or not at all, as it is: programs read it back, and no secret goes into it."""
    with replace_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors=errors)


def hide_in_file(file: Path) -> None:
    """Rewrite a text file without the secrets that this process knows, and that its writer may not have known."""
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        if all(hide_known(line) == line for line in lines):
            return
    with (
        file.open(encoding="utf-8", errors="surrogateescape") as lines,
        replace_file(file) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="surrogateescape") as clean,
    ):
        clean.writelines(map(hide_known, lines))


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows as JSON lines, without the secrets that this process knows: rows may hold whatever else they like."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as stream:  # a row in one write, since several processes may append to it
        for row in rows:
            stream.write(f"{hide_known(json.dumps(row, ensure_ascii=False))}\n".encode(errors="backslashreplace"))


def rename_durably(unfinished: Path, file: Path) -> None:
    """Give a written file its name once its content is on the disk, so that a machine's crash cannot empty it."""
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    unfinished.replace(file)


def compute_digest(file: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_path(path: Path) -> None:
    """Remove a file or a whole folder; one that is not there is no error. A link goes, and what it names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftover(path: Path) -> None:
    """Remove a file or folder that nobody needs, as far as it can be removed. A link goes, and what it names stays."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def is_inner_path(name: Any) -> bool:
    """Tell whether a name out of a file is the path of something below a folder, from which it does not lead out."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return str(path) == name != "." and not path.is_absolute() and ".." not in path.parts


def find_barrier(path: Path) -> Path | None:
    """Return the file or folder that keeps this user from reading a path: the path itself, or a folder on the way.

    A folder is read where it can be listed and entered. Links are followed. Return None where nothing is in the way,
    and where the path is not there: whoever opens it tells.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError:
        folders = reversed(Path(os.path.realpath(path)).parents)
        return next((folder for folder in folders if not os.access(folder, os.X_OK)), path)
    except (OSError, ValueError):  # not there, or no path at all
        return None
    return None if os.access(path, os.R_OK | os.X_OK if is_folder else os.R_OK) else path


def find_denied(place: Path, depth: int = 0) -> Iterator[Path]:
    """Yield what this user may not read at a place, and below it down to a depth. Hidden entries are left out."""
    if find_barrier(place) is not None:
        yield place
    elif depth > 0 and os.path.isdir(place):
        for entry in sorted(place.iterdir()):
            if not entry.name.startswith("."):
                yield from find_denied(entry, depth - 1)


def explain_denied(denied: Sequence[Path], place: Path) -> Iterator[str]:
    """Yield one sentence on all files and folders at or below a place that this user may not read, if there are any."""
    if not denied:
        return
    first = denied[0]
    barrier = find_barrier(first) or first
    more = f" and {len(denied) - 1} more at {place}" if len(denied) > 1 else ""
    way = f", who may not enter {barrier}" if barrier != first else ""
    closed = place if more else barrier
    yield (
        f"{first}{more} cannot be read by user {os.getuid()}{way}: make it readable "
        f"(`chmod -R a+rX {shlex.quote(str(closed))}`), or run as another user."
    )


def find_denial(place: Path, depth: int = 0) -> Iterator[str]:
    """Yield one sentence where this user may not read a place, or something below it down to a depth."""
    yield from explain_denied(list(find_denied(place, depth)), place)


def check_access(place: Path) -> None:
    """Raise UserError where this user may not read a file, or may not list or enter a folder."""
    if problems := list(find_denial(place)):
        raise UserError(*problems)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} where there is no file. Raises UserError on any other content.

    The same for a file that this user may not read.
    """
    check_access(path)
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except UnreadableTextError as error:
        raise UserError(f"{path} {error.reason}: write it as one JSON object.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}: write it as one JSON object.")
    return value
