# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, their digests, and their removal."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with replace_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


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
