# SPDX-License-Identifier: Apache-2.0
"""The journal of a job, output/data/metrics.jsonl: all that is measured and happens, one JSON object a line.

The first training host's launcher and rank 0 append to it, and nothing can delay them. The reporter follows it
(trackers/reporter.py), sends what is new to the trackers, and makes the report from it. A tracker that is gone, slow or
broken holds up nothing and loses nothing.

Every record has `time` (seconds since the epoch) and `kind`. The types in records.py name its other fields.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.redaction import hide_in
from llm_trainer.journal.records import Record, RecordKind, parse_record

FILE_NAME = "metrics.jsonl"


class Journal:
    """A file to which records are appended, without secrets. Several processes of a host may append at once."""

    def __init__(self, file: Path | None) -> None:
        """Open nothing yet. Without a file nothing is written: other ranks speak for this one."""
        self.file = file
        self.is_broken = False

    def clear(self) -> None:
        """Remove the journal of an earlier job in the same tree."""
        with suppress(OSError):  # the first record that cannot be written says why
            if self.file is not None:
                self.file.unlink()

    def write(self, kind: RecordKind, **fields: Any) -> None:
        """Append a record. Where that fails, as on a full disk, say so once and go on: it must not end a training."""
        if self.file is None:
            return
        record = {"time": round(time.time(), 3), "kind": kind, **hide_in(fields)}
        line = json.dumps(record, default=str, separators=(",", ":")).encode() + b"\n"
        try:
            append_line(self.file, line)
        except OSError as error:
            if not self.is_broken:
                log.error(f"Warning: {self.file} cannot be written ({error}): metrics are lost.")
            self.is_broken = True


def append_line(file: Path, line: bytes) -> None:
    """Append a line in one write to a file opened to append, so that lines of several processes do not mix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(stream, line)
    finally:
        os.close(stream)


def read_records(file: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """Yield the whole records from a byte offset on, each with the offset behind it.

    A line that a full disk cut, and a record of an unknown kind, are passed over.
    """
    if not file.is_file():
        return
    with file.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return  # still being written
            offset += len(line)
            try:
                record = parse_record(json.loads(line))
            except ValueError:  # a line that a full disk cut
                continue
            if record is not None:
                yield record, offset
