# SPDX-License-Identifier: Apache-2.0
"""Types of the journal's records, one for each kind.

A record is the JSON object of one line, so that fields which a type does not name stay in it. Readers pass over records
of a kind that they do not know. All fields but `time` and `kind` may be missing in a journal of an older version.

SCHEMA_VERSION rises when a field gets another meaning or goes, and not when a field or a kind is added. Journals and
manifests from before the first version have none.
"""

from typing import Any, Literal, Required, TypedDict, cast, get_args

from llm_trainer.journal.manifest import Manifest

SCHEMA_VERSION = 1

RecordKind = Literal[
    "job",
    "data",
    "model",
    "metrics",
    "system",
    "phase",
    "checkpoint",
    "generation",
    "completions",
    "event",
    "manifest",
    "end",
]
EndStatus = Literal["done", "stopped", "failed"]


class JobRecord(TypedDict, total=False):
    """A description of the job, written at the start of every attempt."""

    time: Required[float]  # seconds since the epoch, as in all records
    kind: Required[Literal["job"]]
    schema_version: int
    name: str | None
    arn: str | None
    started: float  # seconds since the epoch
    hosts: list[str]  # those that train
    billed_hosts: int  # how many are paid for
    world_size: int
    settings: dict[str, Any]  # without secrets
    environment: dict[str, Any]  # image, revision, packages and the machine
    attempt: int  # 1 is the first


class ShownImage(TypedDict, total=False):
    """An image of a row, for people. One that could no longer be opened has no size."""

    name: Required[str]
    start: Required[int]  # its first token in the row
    tokens: Required[int]
    width: int  # in pixels
    height: int
    thumbnail: str  # a data URI (readers/thumbnails.py)


class SampleRow(TypedDict):
    """A training row with images, for people."""

    text: str  # with marks around what is trained on
    images: list[ShownImage]


class DataRecord(TypedDict, total=False):
    """A description of a split's data."""

    time: Required[float]
    kind: Required[Literal["data"]]
    split: str
    rows: int
    tokens: int
    supervised_tokens: int
    lengths: dict[str, int]  # number of sequences by their length in tokens
    sequences_a_row: int  # 2 where rows are pairs
    sources: list[dict[str, Any]]  # files with name, uri and digest
    digest: str  # of the content of all files
    summary: dict[str, Any]  # as DataReport.summary() gives it
    sample: SampleRow  # of training rows with images


class ModelRecord(TypedDict, total=False):
    """A description of the model, and of how much of it is trained."""

    time: Required[float]
    kind: Required[Literal["model"]]
    model: str
    parameters: int
    trainable_parameters: int
    adapter: dict[str, Any]


class MetricsRecord(TypedDict, total=False):
    """One metric line of the log."""

    time: Required[float]
    kind: Required[Literal["metrics"]]
    step: int
    total_steps: int
    epoch: float
    values: dict[str, float]  # by the names in METRICS


class SystemRecord(TypedDict, total=False):
    """One sample of one host.

    A line of the file has a GPU metric once, as `gpus {metric: [value of each index]}`, which makes it five times
    shorter. `read_records` gives these values as `values`, too.
    """

    time: Required[float]
    kind: Required[Literal["system"]]
    host: str
    values: dict[str, float]  # by names such as `gpu/algo-1/0/utilization_percent`


class PhaseRecord(TypedDict, total=False):
    """A part of the job that has ended, such as `imports`, `data`, `model` or `training`."""

    time: Required[float]
    kind: Required[Literal["phase"]]
    name: str
    seconds: float
    host: str


class CheckpointRecord(TypedDict, total=False):
    """A checkpoint that was written."""

    time: Required[float]
    kind: Required[Literal["checkpoint"]]
    step: int
    seconds: float


class GenerationRecord(TypedDict, total=False):
    """A prompt, and the model's answers before and after the training."""

    time: Required[float]
    kind: Required[Literal["generation"]]
    split: str
    prompt: str
    reference: str
    before: str
    after: str
    images: list[ShownImage]  # of the prompt


class CompletionsRecord(TypedDict, total=False):
    """Completions that the model wrote for a step, with their rewards: a bounded number of them."""

    time: Required[float]
    kind: Required[Literal["completions"]]
    step: int
    completions: list[dict[str, Any]]  # prompt, completion, rewards by name, advantage


class EventRecord(TypedDict, total=False):
    """Something that a person should see, such as an XID error of a GPU."""

    time: Required[float]
    kind: Required[Literal["event"]]
    level: Literal["info", "warning"]
    text: str
    host: str


class ManifestRecord(Manifest, total=False):
    """The whole of training_manifest.json, written when the model is exported."""

    time: Required[float]
    kind: Required[Literal["manifest"]]


class EndRecord(TypedDict, total=False):
    """The end of the last attempt, after which the job is not repeated."""

    time: Required[float]
    kind: Required[Literal["end"]]
    status: EndStatus
    reason: str | None


Record = (
    JobRecord
    | DataRecord
    | ModelRecord
    | MetricsRecord
    | SystemRecord
    | PhaseRecord
    | CheckpointRecord
    | GenerationRecord
    | CompletionsRecord
    | EventRecord
    | ManifestRecord
    | EndRecord
)
KINDS = frozenset(get_args(RecordKind))


def parse_record(fields: dict[str, Any]) -> Record | None:
    """Return a line's JSON object as a record with all its fields, or None where its kind is not known."""
    return cast(Record, expand_gpu_columns(fields)) if fields.get("kind") in KINDS else None


def expand_gpu_columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `gpus`, one list a metric, as `values`, one name a number."""
    for metric, column in fields.pop("gpus", {}).items():
        for index, value in enumerate(column):
            if value is not None:  # this GPU is not there, or does not tell the metric
                fields.setdefault("values", {})[f"gpu/{fields['host']}/{index}/{metric}"] = value
    return fields
