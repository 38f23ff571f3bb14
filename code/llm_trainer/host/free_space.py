# SPDX-License-Identifier: Apache-2.0
"""The free space on this host's disks: bytes, and the inodes that each file and folder takes one of."""

import os
import shutil
from pathlib import Path

from llm_trainer.common.units import GIB, show_bytes
from llm_trainer.host.findings import Finding

MIN_DISK_BYTES = 10 * GIB
SAVE_SPACE = "or keep fewer checkpoints (save_total_limit)."
FIX = "raise VolumeSizeInGB on SageMaker, mount a larger disk there with docker."


def find_nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that this user can see, where it is not made yet."""
    return next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))


def inspect_disk(subject: str, folder: Path) -> Finding:
    """Return a finding on the free space of the disk where the folder is, or will be made."""
    free_bytes = find_free_bytes(folder)
    free = f"{show_bytes(free_bytes)} free on {folder}"
    if free_bytes >= MIN_DISK_BYTES:
        return Finding(subject, "ok", free)
    text = f"{free}, and weights, checkpoints and caches soon take {show_bytes(MIN_DISK_BYTES)}: {FIX}"
    return Finding(subject, "warning", text)


def find_free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk where the folder is, or will be made."""
    statistics = os.statvfs(find_nearest_folder(folder))
    return statistics.f_bavail * statistics.f_frsize


def has_inodes(folder: Path) -> bool:
    """Tell whether the folder's disk can hold one more file. A disk that does not count its files always can."""
    statistics = os.statvfs(find_nearest_folder(folder))
    return statistics.f_files == 0 or statistics.f_favail > 0


def describe_lack(folder: Path, over_quota: bool = False) -> str:
    """Return what a folder's disk has run out of, and what to change, as the end of a sentence.

    `over_quota` is for an error that says so. Where there are bytes and inodes left now, what failed to be written
    has been removed meanwhile.
    """
    place = find_nearest_folder(folder)
    disk = shutil.disk_usage(place)
    left = f"{disk.free / 1e9:.2f} of {disk.total / 1e9:.2f} GB are free"
    if over_quota:
        return f"found the quota on {folder} used up ({left}): remove files there, or have the quota raised."
    if not has_inodes(folder):
        num_inodes = os.statvfs(place).f_files
        return (
            f"found no inode on the disk of {folder} for one more file ({num_inodes:,} are taken, {left}): put the "
            "data into fewer, larger files, or mount a disk with more inodes; a larger volume has more."
        )
    return f"found no space on the disk of {folder} ({left}): raise the job's VolumeSizeInGB, {SAVE_SPACE}"
