# SPDX-License-Identifier: Apache-2.0
"""The load of a host beside its GPUs: processor, memory, disks and network. Reads psutil and cgroup files."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from llm_trainer.host.free_space import find_nearest_folder
from llm_trainer.host.machine import CGROUP_LIMITS, SHARED_MEMORY_DIR, read_limit

# Name -> what it is; units are in the names. In the journal each stands behind host/<host>/.
HOST_METRICS = {
    "cpu_percent": "share of all cores' time since the last sample",
    "memory_used_bytes": "memory in use, of the container where it has a limit, else of the machine",
    "memory_percent": "the same, of the limit or of what the machine has",
    "shared_memory_used_bytes": "in use in /dev/shm",
    "checkpoints_free_bytes": "free on the disk of the checkpoints",
    "temp_free_bytes": "free on the disk of /tmp",
    "disk_read_bytes_per_second": "read from all disks",
    "disk_written_bytes_per_second": "written to all disks",
    "network_received_bytes_per_second": "received by all interfaces but the loopback; EFA's own traffic is not in it",
    "network_sent_bytes_per_second": "sent by them",
}
CGROUP_DIRS = tuple(limit.parent for limit in CGROUP_LIMITS)  # v2, v1
USAGES = ("memory.current", "memory.usage_in_bytes")
CACHES = ("inactive_file", "total_inactive_file")  # lines of memory.stat: memory that the kernel gives back


class HostReader:
    """Reads the figures of HOST_METRICS; rates are over the time since the last reading."""

    def __init__(self, folders: Mapping[str, Path], cgroup_dirs: tuple[Path, ...] = CGROUP_DIRS) -> None:
        """Take folders by the name that stands in the metric of their disk."""
        self.folders = folders
        self.cgroup_dirs = cgroup_dirs
        psutil.cpu_percent()  # its first answer means nothing
        self.totals, self.read_at = read_totals(), time.monotonic()

    def read(self) -> dict[str, float]:
        """Return the value of each metric."""
        used_bytes, limit_bytes = read_memory(self.cgroup_dirs)
        values: dict[str, float] = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_bytes": used_bytes,
            "memory_percent": round(100 * used_bytes / limit_bytes, 1),
        }
        if SHARED_MEMORY_DIR.is_dir():
            values["shared_memory_used_bytes"] = shutil.disk_usage(SHARED_MEMORY_DIR).used
        for name, folder in self.folders.items():
            values[f"{name}_free_bytes"] = shutil.disk_usage(find_nearest_folder(folder)).free
        totals, now = read_totals(), time.monotonic()
        for name in totals.keys() & self.totals.keys():
            values[f"{name}_bytes_per_second"] = round((totals[name] - self.totals[name]) / (now - self.read_at))
        self.totals, self.read_at = totals, now
        return values


def read_totals() -> dict[str, int]:
    """Return the bytes read, written, received and sent since the machine's start."""
    totals: dict[str, int] = {}
    if disks := psutil.disk_io_counters():  # None where the kernel shows no disks
        totals |= {"disk_read": disks.read_bytes, "disk_written": disks.write_bytes}
    cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    totals["network_received"] = sum(card.bytes_recv for card in cards)
    totals["network_sent"] = sum(card.bytes_sent for card in cards)
    return totals


def read_memory(cgroup_dirs: tuple[Path, ...]) -> tuple[int, int]:
    """Return the bytes in use and the limit: the container's where it has one, else the machine's."""
    machine = psutil.virtual_memory()
    for folder, limit, usage, cache in zip(cgroup_dirs, CGROUP_LIMITS, USAGES, CACHES, strict=True):
        file = folder / limit.name
        if file.is_file() and (limit_bytes := read_limit(file)) < machine.total:
            pairs = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            statistics = {name: int(number) for name, number in pairs}
            return int((folder / usage).read_text(encoding="ascii")) - statistics.get(cache, 0), int(limit_bytes)
    return machine.total - machine.available, machine.total
