# SPDX-License-Identifier: Apache-2.0
"""Samples of a host's GPUs and of the host itself while a job runs, taken in threads of its launcher.

GPUs have a thread of their own: a driver that hangs holds up only that thread, and the other one reports it.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

import pynvml

from llm_trainer.common import log
from llm_trainer.host.gpu_metrics import Gpus
from llm_trainer.host.host_metrics import HostReader
from llm_trainer.host.nvidia_driver import open_nvml
from llm_trainer.journal.records import RecordKind

# The interval grows with the job, so that a day of 8 hosts with 8 GPUs each leaves 42 MB in the journal.
MIN_INTERVAL_SECONDS = 5.0
MAX_INTERVAL_SECONDS = 60.0
INTERVALS_IN_AGE = 360
WATCH_SECONDS = 1.0  # how often XIDs are taken: soon enough to explain the failure that follows
RECENT_SECONDS = 300.0
HANG_SECONDS = 60.0
END_SECONDS = 2.0  # a thread that has not ended by then, which a hung driver holds, is left behind


class WriteRecord(Protocol):
    """A function that takes a record for the journal."""

    def __call__(self, kind: RecordKind, **fields: Any) -> None:
        """Append a record of this kind."""


def choose_interval(age_seconds: float) -> float:
    """Return the seconds from one sample to the next in a job of that age."""
    return min(max(MIN_INTERVAL_SECONDS, age_seconds / INTERVALS_IN_AGE), MAX_INTERVAL_SECONDS)


class SystemMetrics:
    """Writes `system` records of this host, and `event` records about its GPUs, while the block runs."""

    def __init__(self, host: str, folders: Mapping[str, Path], write: WriteRecord, started: float) -> None:
        """Take names and folders whose disks are sampled, and the job's start in seconds since the epoch."""
        self.host = host
        self.folders = folders
        self.write = write
        self.started = started
        self.ended = threading.Event()
        self.gpus: Gpus | None = None
        self.asking_since: float | None = None  # time.monotonic(), while NVML owes an answer
        self.threads = [
            threading.Thread(target=self.sample_host, daemon=True),
            threading.Thread(target=self.sample_gpus, daemon=True),
        ]

    def __enter__(self) -> Self:
        """Start the threads."""
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the threads; one that a hung driver holds is left behind."""
        self.ended.set()
        deadline = time.monotonic() + END_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def warn(self, text: str) -> None:
        """Log a warning, and write it to the journal."""
        log.warning(text)
        self.write("event", host=self.host, level="warning", text=text)

    def find_recent_faults(self) -> list[str]:
        """List what GPUs of this host reported within the last minutes."""
        faults = self.gpus.faults.copy() if self.gpus else {}
        since = time.monotonic() - RECENT_SECONDS
        return [text for text, at in faults.items() if at > since]

    def choose_interval(self) -> float:
        """Return the seconds to the next sample."""
        return choose_interval(time.time() - self.started)

    def sample_host(self) -> None:
        """Sample the host until the end, and report a driver that hangs."""
        reader = HostReader(self.folders)
        told = False
        while not self.ended.wait(self.choose_interval()):
            with suppress(OSError):  # a folder or a kernel file that went just then: the next sample has its values
                values = {f"host/{self.host}/{name}": value for name, value in reader.read().items()}
                self.write("system", host=self.host, values=values)
            asking_since = self.asking_since
            if not told and asking_since is not None and time.monotonic() - asking_since > HANG_SECONDS:
                told = True
                self.warn(f"NVML on {self.host} has not answered for {HANG_SECONDS:.0f} s: a GPU or its driver hangs.")

    def sample_gpus(self) -> None:
        """Sample the GPUs until the end; a machine without NVIDIA's driver has none."""
        self.asking_since = time.monotonic()
        try:
            with open_nvml():
                self.gpus = Gpus(self.host, self.warn)
                self.sample_until_end(self.gpus)
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
            pass  # a machine without NVIDIA's driver: the host's figures are all there is
        except pynvml.NVMLError as error:
            self.warn(f"NVML on {self.host} says {error}: there are no metrics of its GPUs.")
        self.asking_since = None

    def sample_until_end(self, gpus: Gpus) -> None:
        """Take XIDs every second, and a sample at every interval, until the end."""
        due = time.monotonic()
        while True:
            self.asking_since = time.monotonic()
            gpus.collect_xids()
            if time.monotonic() >= due:
                if columns := gpus.read():
                    self.write("system", host=self.host, gpus=columns)
                due = time.monotonic() + self.choose_interval()
            self.asking_since = None
            if self.ended.wait(WATCH_SECONDS):
                return
