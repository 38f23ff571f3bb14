# SPDX-License-Identifier: Apache-2.0
"""The free space on this host's disks."""

import os
from pathlib import Path

from llm_trainer.common.findings import Finding
from llm_trainer.common.units import GIB, show_bytes

MIN_DISK_BYTES = 10 * GIB
FIX = "raise VolumeSizeInGB on SageMaker, mount a larger disk there with docker."


def find_nearest_folder(folder: Path) -> Path:
    """Return the folder, or where it is not made yet, the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


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
