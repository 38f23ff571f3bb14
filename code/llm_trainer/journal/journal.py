# SPDX-License-Identifier: Apache-2.0
"""The journal of a job, output/data/metrics.jsonl: all that is measured and happens, one JSON object a line.

The first training host's launcher and rank 0 append to it, which nothing can delay; the reporter (reporter.py) follows
it, sends what is new to the trackers, and makes the report of it. So a tracker that is gone, slow or broken holds up
nothing and loses nothing. Needs no torch.

Every record has `time` (seconds since the epoch) and `kind`, and by its kind:

    job         name, arn, started (seconds since the epoch), hosts (list: those that train), billed_hosts (how many are
                paid for), world_size, settings (redacted), environment {image, revision, packages, ...}, attempt: at
                the start of every attempt
    data        split, rows, tokens, supervised_tokens, lengths {tokens: rows}, sources [{name, uri, digest, ...}],
                summary (DataReport.summary())
    model       model, parameters, trainable_parameters, adapter: what is trained
    metrics     step, total_steps, epoch, values {name of METRICS: number}: one line of the log
    system      host, values {name: number}: one sample of one host; names such as `gpu/algo-1/0/utilization_percent`.
                A line has a GPU metric's name once, `gpus {metric: [value of each index]}`, which makes it five times
                shorter; read_records gives `values`
    phase       name, seconds, host: a part of the job that has ended, such as `imports`, `data`, `model`, `training`
    checkpoint  step, seconds
    generation  split, prompt, reference, before, after: texts, before and after the training
    event       level (`info` or `warning`), text, host: what a person should see, such as an XID of a GPU
    manifest    all of training_manifest.json (manifest.py), when the model is exported
    end         status (`done`, `stopped` or `failed`), reason: the last one of an attempt that is not repeated
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_trainer.common.redaction import hide_in

FILE_NAME = "metrics.jsonl"
MANIFEST = "training_manifest.json"  # in the model folder; its content is a record, too


class Journal:
    """Appends records, without secrets; several processes of a host may do so at once."""

    def __init__(self, file: Path | None) -> None:
        self.file = file  # None: of a rank that only others speak for
        self.is_broken = False

    def clear(self) -> None:
        with suppress(OSError):  # the first record that cannot be written says why
            if self.file is not None:
                self.file.unlink()

    def write(self, kind: str, **fields: Any) -> None:
        """Append a record. Where that fails, as on a full disk, say so once and go on: it must not end a training."""
        if self.file is None:
            return
        record = {"time": round(time.time(), 3), "kind": kind, **hide_in(fields)}
        line = json.dumps(record, default=str, separators=(",", ":")).encode() + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # One write of a file opened to append: lines of several processes do not mix.
            stream = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(stream, line)
            finally:
                os.close(stream)
        except OSError as error:
            if not self.is_broken:
                print(f"Warning: {self.file} cannot be written ({error}): metrics are lost.", file=sys.stderr)
            self.is_broken = True


def read_records(file: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole records from `offset` on, each with the offset behind it."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return  # still being written
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:  # a line that a full disk cut
                continue
            yield spread(record), offset


def spread(record: dict[str, Any]) -> dict[str, Any]:
    """The record with `gpus`, a list for each metric, as `values`, a name for each number."""
    for metric, column in record.pop("gpus", {}).items():
        for index, value in enumerate(column):
            if value is not None:  # no such GPU, or it does not tell
                record.setdefault("values", {})[f"gpu/{record['host']}/{index}/{metric}"] = value
    return record
