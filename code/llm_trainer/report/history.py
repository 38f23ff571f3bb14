# SPDX-License-Identifier: Apache-2.0
"""The history of a job: what its journal tells, put together for the report. Everything in it may be missing."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from llm_trainer.common.errors import cut_quote
from llm_trainer.common.units import count_instance_hours
from llm_trainer.journal.journal import read_records
from llm_trainer.journal.records import (
    CheckpointRecord,
    CompletionsRecord,
    DataRecord,
    EndRecord,
    EventRecord,
    GenerationRecord,
    JobRecord,
    ManifestRecord,
    MetricsRecord,
    ModelRecord,
    PhaseRecord,
    Record,
    SystemRecord,
)
from llm_trainer.journal.series import Series

MAX_EVENTS = 500  # of a GPU that reports an error every second, the first ones tell enough
SYSTEM_POINTS = 240  # few, since there are perhaps a thousand system metrics
# The report shows or judges by these. The others are in metrics.jsonl.
SYSTEM_METRICS = {
    *("utilization_percent", "sm_activity_percent", "memory_percent", "power_watts", "temperature_celsius"),
    *("sm_clock_mhz", "throttled_percent", "xid_errors", "ecc_uncorrected_errors"),
    *("cpu_percent", "shared_memory_used_bytes", "checkpoints_free_bytes", "temp_free_bytes"),
    *("disk_read_bytes_per_second", "disk_written_bytes_per_second"),
    *("network_received_bytes_per_second", "network_sent_bytes_per_second"),
}
HARMFUL_THROTTLING = ("throttled_hardware", "throttled_thermal", "throttled_power_brake")


class Phase(NamedTuple):
    """A part of the job, on one host or on all (an empty name)."""

    name: str
    start: float  # seconds since the epoch
    seconds: float
    host: str


@dataclass
class History:
    """A journal's records, sorted and thinned. A record that the journal lacks has only its kind and a time of 0."""

    job: JobRecord = field(default_factory=lambda: JobRecord(time=0, kind="job"))  # of the last attempt
    attempts: list[float] = field(default_factory=list)  # when each began
    model: ModelRecord = field(default_factory=lambda: ModelRecord(time=0, kind="model"))
    manifest: ManifestRecord = field(default_factory=lambda: ManifestRecord(time=0, kind="manifest"))
    end: EndRecord = field(default_factory=lambda: EndRecord(time=0, kind="end"))
    data: dict[str, DataRecord] = field(default_factory=dict)  # by split
    metrics: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))  # by step
    system: dict[str, Series] = field(default_factory=lambda: defaultdict(partial(Series, SYSTEM_POINTS)))  # by time
    phases: list[Phase] = field(default_factory=list)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    generations: list[GenerationRecord] = field(default_factory=list)
    completions: list[CompletionsRecord] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    num_events: int = 0
    step: int = 0
    total_steps: int = 0
    tokens: float = 0
    first_time: float = 0  # of any record, in seconds since the epoch, as the others
    last_time: float = 0
    first_metrics_time: float = 0
    last_metrics_time: float = 0

    @property
    def duration(self) -> float:
        """Seconds from the first record to the end of the job."""
        return max(0.0, self.last_time - self.first_time)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the job without secrets, by name."""
        return self.job.get("settings") or self.manifest.get("settings") or {}

    def find_setting(self, name: str) -> Any:
        """Return a setting of the job, or an argument of the training that was left to its default."""
        return self.settings.get(name, self.manifest.get("training_arguments", {}).get(name))

    @property
    def earlier_adapters(self) -> list[str]:
        """The jobs of the adapters that the training went on from, the newest first, with their steps."""
        named = []
        for entry in self.manifest.get("lineage") or ():
            job, steps = entry.get("training_job_name") or entry.get("adapter"), entry.get("num_steps")
            named.append(f"{cut_quote(str(job))} ({steps} steps)" if isinstance(steps, int) else cut_quote(str(job)))
        return named

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts that train."""
        return self.job.get("hosts") or sorted({name.split("/")[1] for name in self.system if "/" in name})

    @property
    def instance_hours(self) -> float | None:
        """Instance hours of the last job, as it counted them itself (training/progress.py), if the journal tells.

        A job that this one goes on with was billed by itself.
        """
        if not {"billed_hosts", "started"} <= self.job.keys():
            return None
        return count_instance_hours(self.job["billed_hosts"], self.job["started"], self.last_time)

    def measure_training(self) -> float:
        """Return the seconds from the first metric line to the last."""
        return max(0.0, self.last_metrics_time - self.first_metrics_time)

    def list_devices_in_training(self, what: str) -> dict[str, Series]:
        """Return what `list_devices` does, between the first metric line and the last."""
        found = {
            device: series.cut_out(self.first_metrics_time, self.last_metrics_time)
            for device, series in self.list_devices(what).items()
        }
        return {device: series for device, series in found.items() if series}

    def list_devices(self, what: str) -> dict[str, Series]:
        """Return a system metric of each device, in order.

        `what` is `gpu/<metric>`, with devices such as `algo-1/0`, or `host/<metric>`, with hosts such as `algo-1`.
        """
        scope, metric = what.split("/")
        found = {}
        for name, series in self.system.items():
            first, *device, last = name.split("/")
            if first == scope and last == metric and series:
                found["/".join(device)] = series
        return dict(sorted(found.items(), key=lambda item: split_numbers(item[0])))

    def find_metric(self, name: str) -> Series:
        """Return a metric by step, empty where it was never logged."""
        return self.metrics.get(name) or Series()


def split_numbers(name: str) -> list[tuple[int, str]]:
    """Return a key to sort names by, in which algo-10 comes after algo-2."""
    parts = name.replace("-", "/").split("/")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def read_history(journal: Path) -> History:
    """Read all of a journal, thinned."""
    history = History()
    for record, _ in read_records(journal):
        time = record["time"]
        history.first_time = min(history.first_time or time, time)
        history.last_time = max(history.last_time, time)
        if record["kind"] == "system":  # first, since almost all records are samples
            add_sample(history, record)
        else:
            add_record(history, record)
    return history


def add_record(history: History, record: Record) -> None:
    """Take a record that says what happened."""
    match record["kind"]:
        case "metrics":
            add_metrics(history, record)
        case "phase":
            add_phase(history, record)
        case "checkpoint":
            history.checkpoints.append(record)
        case "generation":
            history.generations.append(record)
        case "completions":
            history.completions.append(record)
        case "event":
            add_event(history, record)
        case _:
            add_description(history, record)


def add_description(history: History, record: Record) -> None:
    """Take a record that says what the job, its data and its result are."""
    match record["kind"]:
        case "job":
            add_job(history, record)
        case "data":
            history.data[record["split"]] = record
        case "model":
            history.model.update(record)
        case "manifest":
            history.manifest.update(record)
        case "end":
            history.end.update(record)


def add_job(history: History, record: JobRecord) -> None:
    """Take the beginning of an attempt. The end of the one before does not count, nor do its answers to prompts."""
    history.job = record
    history.generations = []
    history.end = EndRecord(time=0, kind="end")
    history.attempts.append(record["time"])


def add_metrics(history: History, record: MetricsRecord) -> None:
    """Take a metric line. Where its step is not the next, an attempt began again from a checkpoint."""
    step, time = record.get("step", 0), record["time"]
    if step < history.step:
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


def add_sample(history: History, record: SystemRecord) -> None:
    """Take a sample of the system. Shares of memory and of throttling are made from the figures in it."""
    values, time = record["values"], record["time"]
    for name, value in values.items():
        device, metric = split_name(name)
        if metric in SYSTEM_METRICS:
            history.system[name].add(time, value)
        elif metric == "memory_used_bytes" and f"{device}/memory_total_bytes" in values:
            history.system[f"{device}/memory_percent"].add(time, 100 * value / values[f"{device}/memory_total_bytes"])
        elif metric == HARMFUL_THROTTLING[0]:
            # The power limit is left out, since all GPUs under full load are at it.
            is_throttled = any(values.get(f"{device}/{reason}") for reason in HARMFUL_THROTTLING)
            history.system[f"{device}/throttled_percent"].add(time, 100 * is_throttled)


@cache  # there are few names, and millions of samples
def split_name(name: str) -> tuple[str, str]:
    """Split a system metric's name into the device and the metric: `gpu/algo-1/0` and `power_watts`."""
    device, _, metric = name.rpartition("/")
    return device, metric


def add_phase(history: History, record: PhaseRecord) -> None:
    """Take a phase, which may have begun before the first record."""
    seconds = float(record.get("seconds", 0))
    name, host = str(record.get("name", "?")), str(record.get("host") or "")
    history.phases.append(Phase(name, record["time"] - seconds, seconds, host))
    history.first_time = min(history.first_time, record["time"] - seconds)


def add_event(history: History, record: EventRecord) -> None:
    """Count an event, and keep it if it is among the first."""
    history.num_events += 1
    if len(history.events) < MAX_EVENTS:
        history.events.append(record)
