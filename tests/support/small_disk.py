# SPDX-License-Identifier: Apache-2.0
"""A folder or a /dev/shm that is soon full: a small tmpfs, where this process may mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    """Skips the test where nothing can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k,nr_inodes=10000", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs root and the right to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def with_shared_memory(size: str, used_bytes: int = 0) -> list[str]:
    """The beginning of a command that runs the rest of it with a /dev/shm of this size. Skips the test likewise."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && head -c {used_bytes} /dev/zero > /dev/shm/used"
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small /dev/shm needs root and the right to mount: {tried.stderr.strip()}")
    return command
