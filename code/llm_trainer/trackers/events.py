# SPDX-License-Identifier: Apache-2.0
"""What of the journal's records every tracker gets: numbers by name and step, settings, and the name of the run."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

Record = dict[str, Any]

MAX_LISTED_FILES = 100  # of a split: MLflow takes 64 KiB about a source


class Row(NamedTuple):
    """Numbers of one moment. `step` is of the training, or of the seconds since the run began in what the system gives,
    which has values before the first step and between two."""

    axis: Literal["step", "seconds"]
    step: int
    time: float  # seconds since the epoch
    values: dict[str, float]


class DataSet(NamedTuple):
    """What a split was made of. `digest` is of the content of all its files."""

    split: str
    digest: str
    source: Record
    sizes: dict[str, int]


def read_rows(records: Iterable[Record], started: float) -> Iterator[Row]:
    """The numbers in the records; `started` is when the run began, in seconds since the epoch."""
    for record in records:
        numbers = (int, float)
        values = {n: float(v) for n, v in find_values(record).items() if isinstance(v, numbers) and math.isfinite(v)}
        if values and record["kind"] == "system":
            yield Row("seconds", max(0, round(record["time"] - started)), record["time"], values)
        elif values:
            yield Row("step", int(record.get("step") or record.get("num_steps") or 0), record["time"], values)


def find_values(record: Record) -> dict[str, Any]:
    match record["kind"]:
        case "metrics" | "system":
            return dict(record["values"])
        case "phase":
            return {f"phase/{record['name']}": record["seconds"]}
        case "checkpoint":
            return {"checkpoint_seconds": record["seconds"]}
        case "manifest":
            return {f"final/{name}": value for name, value in record["metrics"].items()}
    return {}


def find_parameters(records: Iterable[Record]) -> dict[str, str]:
    """What was asked for and what is trained, each value as a text."""
    found: dict[str, Any] = {}
    for record in records:
        if record["kind"] == "job":
            found |= {**record["settings"], "world_size": record["world_size"]}
        elif record["kind"] == "model":
            names = ("model", "parameters", "trainable_parameters", "adapter")
            found |= {name: record[name] for name in names if record.get(name) is not None}
    return {name: as_text(value) for name, value in found.items()}


def find_surroundings(records: Iterable[Record]) -> dict[str, str]:
    """Which job it is, where it runs, and what it is made of."""
    found: dict[str, Any] = {}
    for record in records:
        if record["kind"] == "job":
            found |= {"training_job_name": record.get("name"), "training_job_arn": record.get("arn")}
            found |= {"hosts": ", ".join(record["hosts"]), "attempt": record.get("attempt")}
            found |= {f"environment.{name}": value for name, value in record["environment"].items()}
    return {name: as_text(value) for name, value in found.items() if value is not None}


def find_data_sets(records: Iterable[Record]) -> Iterator[DataSet]:
    """The data of each split."""
    for record in records:
        if record["kind"] == "data":
            sizes = {name: record[name] for name in ("rows", "tokens", "supervised_tokens")}
            sources = record["sources"]
            source = {"num_files": len(sources), "files": sources[:MAX_LISTED_FILES]}
            yield DataSet(record["split"], record["digest"], source, sizes)


def choose_run_name(job: Record, given: str | None) -> str:
    """The setting `run_name`, else what the tracker's own variable gave, else the job's name, else model and time."""
    model = str(job["settings"].get("model_id") or "fine-tuning").rstrip("/").rpartition("/")[2]
    moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime(job["time"]))
    return str(job["settings"].get("run_name") or given or job.get("name") or f"{model} {moment}")


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
