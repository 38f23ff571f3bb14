# SPDX-License-Identifier: Apache-2.0
"""The history of a job: what its journal tells, put together for the report. Everything in it may be missing."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from llm_trainer.common.units import count_instance_hours
from llm_trainer.journal.journal import read_records
from llm_trainer.journal.series import Series

Record = dict[str, Any]
MAX_EVENTS = 500  # of a GPU that reports an error every second, the first ones tell enough
SYSTEM_POINTS = 240  # of each of perhaps a thousand system metrics
# Those that the report shows or judges by. The others are in metrics.jsonl.
SYSTEM_METRICS = {
    *("utilization_percent", "sm_activity_percent", "memory_percent", "power_watts", "temperature_celsius"),
    *("sm_clock_mhz", "throttled_percent", "xid_errors", "ecc_uncorrected_errors"),
    *("cpu_percent", "shared_memory_used_bytes", "checkpoints_free_bytes", "temp_free_bytes"),
    *("disk_read_bytes_per_second", "disk_written_bytes_per_second"),
    *("network_received_bytes_per_second", "network_sent_bytes_per_second"),
}
HARMFUL_THROTTLING = ("throttled_hardware", "throttled_thermal", "throttled_power_brake")


class Phase(NamedTuple):
    name: str
    start: float  # seconds since the epoch
    seconds: float
    host: str


@dataclass
class History:
    job: Record = field(default_factory=dict)  # of the last attempt
    attempts: list[float] = field(default_factory=list)  # when each began
    model: Record = field(default_factory=dict)
    manifest: Record = field(default_factory=dict)
    end: Record = field(default_factory=dict)
    data: dict[str, Record] = field(default_factory=dict)  # split -> its record
    metrics: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))  # by step
    system: dict[str, Series] = field(default_factory=lambda: defaultdict(partial(Series, SYSTEM_POINTS)))  # by time
    phases: list[Phase] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)
    generations: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    num_events: int = 0
    step: int = 0
    total_steps: int = 0
    tokens: float = 0
    first_time: float = 0  # of any record
    last_time: float = 0
    first_metrics_time: float = 0
    last_metrics_time: float = 0

    @property
    def duration(self) -> float:
        """Seconds from the first record to the end of the job."""
        return max(0.0, self.last_time - self.first_time)

    @property
    def settings(self) -> Record:
        return self.job.get("settings") or self.manifest.get("settings") or {}

    def setting(self, name: str) -> Any:
        """A setting of the job, or an argument of the training that was left to its default."""
        return self.settings.get(name, self.manifest.get("training_arguments", {}).get(name))

    @property
    def hosts(self) -> list[str]:
        return self.job.get("hosts") or sorted({name.split("/")[1] for name in self.system if "/" in name})

    @property
    def instance_hours(self) -> float | None:
        """Of the last job, as it counted them itself (progress.py): a job that it goes on with was billed by itself."""
        if not {"billed_hosts", "started"} <= self.job.keys():
            return None
        return count_instance_hours(self.job["billed_hosts"], self.job["started"], self.last_time)

    def training_seconds(self) -> float:
        """From the first metric line to the last."""
        return max(0.0, self.last_metrics_time - self.first_metrics_time)

    def while_training(self, what: str) -> dict[str, Series]:
        """The system metric of each device or host, such as `algo-1/0`, between the first metric line and the last."""
        found = {
            device: series.between(self.first_metrics_time, self.last_metrics_time)
            for device, series in self.by_device(what).items()
        }
        return {device: series for device, series in found.items() if series}

    def by_device(self, what: str) -> dict[str, Series]:
        """The system metric `gpu/<what>` or `host/<what>` of each GPU (`algo-1/0`) or host (`algo-1`), in order."""
        scope, metric = what.split("/")
        found = {}
        for name, series in self.system.items():
            first, *device, last = name.split("/")
            if first == scope and last == metric and series:
                found["/".join(device)] = series
        return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))

    def values(self, name: str) -> Series:
        """The metric by step; empty where it was never logged."""
        return self.metrics.get(name) or Series()


def natural_order(name: str) -> list[tuple[int, str]]:
    """So that algo-10 comes after algo-2."""
    parts = name.replace("-", "/").split("/")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def read_history(journal: Path) -> History:
    """All of the journal, thinned. Records of a kind that is not known are passed over."""
    history = History()
    for record, _ in read_records(journal):
        time = record["time"]
        history.first_time = min(history.first_time or time, time)
        history.last_time = max(history.last_time, time)
        if record["kind"] in READERS:
            READERS[record["kind"]](history, record)
    return history


def read_job(history: History, record: Record) -> None:
    history.job = record
    history.end = {}  # of an attempt that was repeated
    history.attempts.append(record["time"])


def read_metrics(history: History, record: Record) -> None:
    step, time = record.get("step", 0), record["time"]
    if step < history.step:  # another attempt, from a checkpoint
        for series in history.metrics.values():
            series.drop_from(step)
    history.step = step
    history.total_steps = record.get("total_steps", history.total_steps)
    history.first_metrics_time = history.first_metrics_time or time
    history.last_metrics_time = time
    values = record.get("values", {})
    history.tokens = values.get("tokens", history.tokens)
    for name, value in values.items():
        history.metrics[name].drop_from(step)
        history.metrics[name].add(step, value)
    if "eval_runtime" in values:
        history.phases.append(Phase("evaluation", time - values["eval_runtime"], values["eval_runtime"], ""))


def read_system(history: History, record: Record) -> None:
    values, time = record["values"], record["time"]
    for name, value in values.items():
        device, metric = split_name(name)
        if metric in SYSTEM_METRICS:
            history.system[name].add(time, value)
        elif metric == "memory_used_bytes" and f"{device}/memory_total_bytes" in values:
            history.system[f"{device}/memory_percent"].add(time, 100 * value / values[f"{device}/memory_total_bytes"])
        elif metric == HARMFUL_THROTTLING[0]:
            # The power limit, which all GPUs under full load are at, is left out.
            is_throttled = any(values.get(f"{device}/{reason}") for reason in HARMFUL_THROTTLING)
            history.system[f"{device}/throttled_percent"].add(time, 100 * is_throttled)


@cache
def split_name(name: str) -> tuple[str, str]:
    """`gpu/algo-1/0` and `power_watts`, of which there are few, and millions of samples."""
    device, _, metric = name.rpartition("/")
    return device, metric


def read_phase(history: History, record: Record) -> None:
    seconds = float(record.get("seconds", 0))
    name, host = str(record.get("name", "?")), str(record.get("host") or "")
    history.phases.append(Phase(name, record["time"] - seconds, seconds, host))
    history.first_time = min(history.first_time, record["time"] - seconds)


def read_event(history: History, record: Record) -> None:
    history.num_events += 1
    if len(history.events) < MAX_EVENTS:
        history.events.append(record)


READERS: dict[str, Callable[[History, Record], None]] = {
    "job": read_job,
    "data": lambda history, record: history.data.update({record["split"]: record}),
    "model": lambda history, record: history.model.update(record),
    "manifest": lambda history, record: history.manifest.update(record),
    "metrics": read_metrics,
    "system": read_system,
    "phase": read_phase,
    "checkpoint": lambda history, record: history.checkpoints.append(record),
    "generation": lambda history, record: history.generations.append(record),
    "event": read_event,
    "end": lambda history, record: history.end.update(record),
}
