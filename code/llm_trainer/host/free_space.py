# SPDX-License-Identifier: Apache-2.0
"""Free space on this host's disks."""

import os
from pathlib import Path

from llm_trainer.common.findings import GIB, Finding, show_bytes


def find_nearest_folder(folder: Path) -> Path:
    """The folder, or where it is not made yet, the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


MIN_DISK_BYTES = 10 * GIB
FIX = "raise VolumeSizeInGB on SageMaker, mount a larger disk there with docker."


def inspect_disk(subject: str, folder: Path) -> Finding:
    """Free space where the folder is, or will be made, for a job that nothing is known of."""
    free_bytes = find_free_bytes(folder)
    free = f"{show_bytes(free_bytes)} free on {folder}"
    if free_bytes >= MIN_DISK_BYTES:
        return Finding(subject, "ok", free)
    text = f"{free}, and weights, checkpoints and caches soon take {show_bytes(MIN_DISK_BYTES)}: {FIX}"
    return Finding(subject, "warning", text)


def find_free_bytes(folder: Path) -> int:
    statistics = os.statvfs(find_nearest_folder(folder))
    return statistics.f_bavail * statistics.f_frsize
