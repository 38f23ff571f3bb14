# SPDX-License-Identifier: Apache-2.0
"""Readers of the journal's records that all trackers share: numbers by name and step, settings, the run's name."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from PIL import Image

from llm_trainer.common.log import show_line, show_plainly
from llm_trainer.journal.records import GenerationRecord, JobRecord, Record
from llm_trainer.readers.thumbnails import MAX_A_ROW, join_images, read_thumbnail

MODEL_CHARACTERS = 100  # in a run's name, for which W&B takes 128
ANSWER_TABLE = "sample_answers"
ANSWER_TEXTS = ("split", "prompt", "reference", "before", "after")
MAX_LISTED_FILES = 100  # of a split, since MLflow takes at most 64 KiB about a source


class Row(NamedTuple):
    """Numbers of one moment.

    `step` counts updates of the weights. In a sample of the system it counts seconds since the run began, since there
    are samples before the first update and between two.
    """

    axis: Literal["step", "seconds"]
    step: int
    time: float  # seconds since the epoch
    values: dict[str, float]


class DataSet(NamedTuple):
    """The data of a split. `digest` is of the content of all its files."""

    split: str
    digest: str
    source: dict[str, Any]
    sizes: dict[str, int]


class Answer(NamedTuple):
    """A sample prompt with its answers. `images` are the thumbnails of its images, side by side."""

    texts: dict[str, str]
    images: Image.Image | None


def read_rows(records: Iterable[Record], started: float) -> Iterator[Row]:
    """Yield the finite numbers in the records. `started` is when the run began, in seconds since the epoch."""
    for record in records:
        numbers = (int, float)
        values = {n: float(v) for n, v in find_values(record).items() if isinstance(v, numbers) and math.isfinite(v)}
        if values and record["kind"] == "system":
            yield Row("seconds", max(0, round(record["time"] - started)), record["time"], values)
        elif values:
            yield Row("step", find_step(record), record["time"], values)


def find_values(record: Record) -> dict[str, Any]:
    """Return the values in a record by the names that trackers show, numbers or not."""
    if record["kind"] == "metrics" or record["kind"] == "system":
        return dict(record["values"])
    if record["kind"] == "phase":
        return {f"phase/{record['name']}": record["seconds"]}
    if record["kind"] == "checkpoint":
        return {"checkpoint_seconds": record["seconds"]}
    if record["kind"] == "manifest":
        return {f"final/{name}": value for name, value in record["metrics"].items()}
    return {}


def find_step(record: Record) -> int:
    """Return the number of updates of the weights that a record tells, 0 where it tells none."""
    if record["kind"] == "metrics" or record["kind"] == "checkpoint":
        return int(record.get("step") or 0)
    return (record.get("num_steps") or 0) if record["kind"] == "manifest" else 0


def find_parameters(records: Iterable[Record]) -> dict[str, str]:
    """Return what was asked for and what is trained, each value as a text."""
    found: dict[str, Any] = {}
    for record in records:
        if record["kind"] == "job":
            found |= {**record["settings"], "world_size": record["world_size"]}
        elif record["kind"] == "model":
            names = ("model", "parameters", "trainable_parameters", "adapter")
            found |= {name: value for name, value in record.items() if name in names and value is not None}
    return {name: format_text(value) for name, value in found.items()}


def find_surroundings(records: Iterable[Record]) -> dict[str, str]:
    """Return which job it is, where it runs, and what its image is made of, each value as a text."""
    found: dict[str, Any] = {}
    for record in records:
        if record["kind"] == "job":
            found |= {"training_job_name": record.get("name"), "training_job_arn": record.get("arn")}
            found |= {"hosts": ", ".join(record["hosts"]), "attempt": record.get("attempt")}
            found |= {f"environment.{name}": value for name, value in record["environment"].items()}
    return {name: format_text(value) for name, value in found.items() if value is not None}


def find_data_sets(records: Iterable[Record]) -> Iterator[DataSet]:
    """Yield the data of each split."""
    for record in records:
        if record["kind"] == "data":
            sizes = {
                "rows": record["rows"],
                "tokens": record["tokens"],
                "supervised_tokens": record["supervised_tokens"],
            }
            sources = record["sources"]
            source = {"num_files": len(sources), "files": sources[:MAX_LISTED_FILES]}
            yield DataSet(record["split"], record["digest"], source, sizes)


def renew_answers(answers: list[Answer], records: Iterable[Record]) -> list[Answer]:
    """Return the answers with those among the records. Each attempt of a job gives all of them anew."""
    for record in records:
        if record["kind"] == "job":
            answers = []
        elif record["kind"] == "generation":
            texts = {name: show_plainly(str(record.get(name) or "")) for name in ANSWER_TEXTS}
            answers = [*answers, Answer(texts, join_thumbnails(record))]
    return answers


def join_thumbnails(record: GenerationRecord) -> Image.Image | None:
    """Return the thumbnails of a prompt's images side by side; None where it has none."""
    read = [read_thumbnail(image.get("thumbnail")) for image in (record.get("images") or ())[:MAX_A_ROW]]
    found = [image for image in read if image is not None]
    return join_images(found) if found else None


def build_columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """Return the columns of a table of answers. Images are a column where one answer has some: white for the others."""
    columns: dict[str, list[Any]] = {name: [answer.texts[name] for answer in answers] for name in ANSWER_TEXTS}
    if any(answer.images for answer in answers):
        columns["images"] = [answer.images or join_images([]) for answer in answers]
    return columns


def choose_run_name(job: JobRecord, given: str | None) -> str:
    """Return the run's name for people.

    It is the setting `run_name`, else the name in the tracker's own variable, else the job's name, else the model's
    name and the time. Control characters are shown by their codes, since trackers show names to everybody.
    """
    model = str(job["settings"].get("model_id") or "fine-tuning").rstrip("/").rpartition("/")[2][:MODEL_CHARACTERS]
    moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime(job["time"]))
    return show_line(str(job["settings"].get("run_name") or given or job.get("name") or f"{model} {moment}"))


def format_text(value: Any) -> str:
    """Return a text with the codes of control characters in their place, and any other value as JSON."""
    return show_plainly(value) if isinstance(value, str) else json.dumps(value, default=str)
