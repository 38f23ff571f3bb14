# SPDX-License-Identifier: Apache-2.0
"""Samples a host's GPUs and the host itself while a job runs, in threads of its launcher.

GPUs have a thread of their own: a driver that hangs holds up nothing but it, and is told of by the other.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

import pynvml

from llm_trainer.host.gpu_metrics import Gpus
from llm_trainer.host.host_metrics import HostReader
from llm_trainer.host.nvidia_driver import nvml

# The interval grows with the job, so that what a day of 8 hosts with 8 GPUs each leaves in the journal is 42 MB.
MIN_INTERVAL_SECONDS = 5.0
MAX_INTERVAL_SECONDS = 60.0
INTERVALS_IN_AGE = 360
WATCH_SECONDS = 1.0  # how often XIDs are taken: soon enough to explain the failure that follows
RECENT_SECONDS = 300.0
HANG_SECONDS = 60.0
END_SECONDS = 2.0  # a thread that has not ended by then, which a hung driver holds, is left behind


class Write(Protocol):
    """Takes a record for the journal, as Journal.write does."""

    def __call__(self, kind: str, **fields: object) -> None: ...


def choose_interval(age_seconds: float) -> float:
    """Seconds from one sample to the next in a job of that age."""
    return min(max(MIN_INTERVAL_SECONDS, age_seconds / INTERVALS_IN_AGE), MAX_INTERVAL_SECONDS)


class SystemMetrics:
    """From entry to exit, `system` records of this host go to `write`, and `event` records about its GPUs."""

    def __init__(self, host: str, folders: Mapping[str, Path], write: Write, started: float) -> None:
        self.host = host
        self.folders = folders
        self.write = write
        self.started = started  # seconds since the epoch
        self.ended = threading.Event()
        self.gpus: Gpus | None = None
        self.asking_since: float | None = None  # time.monotonic(), while NVML owes an answer
        self.threads = [
            threading.Thread(target=self.sample_host, daemon=True),
            threading.Thread(target=self.sample_gpus, daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        deadline = time.monotonic() + END_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def warn(self, text: str) -> None:
        print(f"Warning: {text}", flush=True)
        self.write("event", host=self.host, level="warning", text=text)

    def find_recent_faults(self) -> list[str]:
        """What GPUs of this host reported within the last minutes."""
        faults = self.gpus.faults.copy() if self.gpus else {}
        since = time.monotonic() - RECENT_SECONDS
        return [text for text, at in faults.items() if at > since]

    def choose_interval(self) -> float:
        return choose_interval(time.time() - self.started)

    def sample_host(self) -> None:
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
        self.asking_since = time.monotonic()
        try:
            with nvml():
                self.gpus = Gpus(self.host, self.warn)
                self.follow(self.gpus)
        except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
            pass  # a machine without NVIDIA's driver: the host's figures are all there is
        except pynvml.NVMLError as error:
            self.warn(f"NVML on {self.host} says {error}: there are no metrics of its GPUs.")
        self.asking_since = None

    def follow(self, gpus: Gpus) -> None:
        """Until the end: XIDs every second, a sample at every interval."""
        due = time.monotonic()
        while True:
            self.asking_since = time.monotonic()
            gpus.watch()
            if time.monotonic() >= due:
                if columns := gpus.read():
                    self.write("system", host=self.host, gpus=columns)
                due = time.monotonic() + self.choose_interval()
            self.asking_since = None
            if self.ended.wait(WATCH_SECONDS):
                return
