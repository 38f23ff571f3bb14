# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, their digests, their removal, and JSON files of one object."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
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


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} where there is no file. Raises UserError on any other content."""
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except UnreadableTextError as error:
        raise UserError(f"{path} {error.reason}: write it as one JSON object.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}: write it as one JSON object.")
    return value
