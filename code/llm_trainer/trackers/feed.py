# SPDX-License-Identifier: Apache-2.0
"""Keeps a tracker up to date with the journal, in a thread and from an offset of its own.

So one that is down, slow or broken holds up nobody, and gets what it missed, with its times and steps, when it is back.
"""

import errno
import itertools
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llm_trainer.common.errors import chain, summarize
from llm_trainer.common.redaction import hide_secrets
from llm_trainer.journal.journal import read_records

Record = dict[str, Any]

POLL_SECONDS = 1.0
RECORDS_A_BATCH = 100
FIRST_WAIT_SECONDS = 2.0  # after a failure; doubled after each
LONGEST_WAIT_SECONDS = 60.0
LAST_ATTEMPTS = 3  # of a tracker that fails when the job is over
REFUSAL = re.compile(r"40[13]|Unauthori[sz]ed|Forbidden|Denied|credential|expired|api.?key|authenti", re.IGNORECASE)
FULL_DISK = re.compile(r"No space left|disk (is )?full|quota exceeded", re.IGNORECASE)


class Tracker(Protocol):
    """Where a run is told. Every method may raise whatever the library does, and is then called again."""

    name: str  # for people

    def begin(self, job: Record) -> str:
        """Make the job's run or continue it; where it is, for the log."""

    def send(self, records: list[Record]) -> None:
        """Some records that follow each other."""

    def upload(self, files: list[Path]) -> None: ...

    def upload_model(self, folder: Path) -> None: ...

    def end(self, status: str, reason: str | None) -> None:
        """`status` is the journal's: done, stopped or failed."""


@dataclass
class Ending:
    """The end of the job, and what it leaves for the trackers."""

    came: threading.Event = field(default_factory=threading.Event)
    status: str = "stopped"  # of a launcher that ended without a word
    reason: str | None = None
    files: list[Path] = field(default_factory=list)
    model_dir: Path | None = None  # to upload


class Feed(threading.Thread):
    """Keeps one tracker up to date with the journal."""

    def __init__(self, tracker: Tracker, journal: Path, since: float, ending: Ending) -> None:
        super().__init__(daemon=True)  # one that hangs is left behind
        self.tracker, self.journal, self.since, self.ending = tracker, journal, since, ending
        self.offset = 0
        self.has_begun = self.uploads_model = self.is_done = False
        self.num_failures = 0  # without a success between them

    def run(self) -> None:
        attempts_left = LAST_ATTEMPTS
        while not self.is_done and attempts_left > 0:
            is_over = self.ending.came.is_set()
            try:
                has_more = self.advance()
                if is_over and not has_more:
                    self.finish()
            except Exception as error:  # whatever a tracker's library raises, here it ends
                self.describe_failure(error)
                self.num_failures += 1
                attempts_left -= is_over
                self.wait()
            else:
                self.describe_return()
                self.num_failures = 0
                if not has_more and not is_over:
                    self.ending.came.wait(POLL_SECONDS)

    def advance(self) -> bool:
        """Send the next records, if there are any; whether there may be more of them."""
        new = ((record, end) for record, end in read_records(self.journal, self.offset) if record["time"] >= self.since)
        batch = list(itertools.islice(new, RECORDS_A_BATCH))
        records = [record for record, _ in batch]
        if not self.has_begun:
            job = next((record for record in records if record["kind"] == "job"), None)
            if job is None:  # the launcher has yet to write it
                return False
            where = self.tracker.begin(job)
            self.has_begun = True
            say(f"{self.tracker.name}: {where}")
        if batch:
            self.tracker.send(records)
            self.offset = batch[-1][1]
        return len(batch) == RECORDS_A_BATCH

    def finish(self) -> None:
        if self.has_begun:
            self.tracker.upload(self.ending.files)
            if self.ending.model_dir is not None:
                self.uploads_model = True
                self.tracker.upload_model(self.ending.model_dir)
            self.tracker.end(self.ending.status, self.ending.reason)
        self.is_done = True

    def wait(self) -> None:
        if self.ending.came.is_set():
            time.sleep(FIRST_WAIT_SECONDS)
        else:
            self.ending.came.wait(min(FIRST_WAIT_SECONDS * 2 ** (self.num_failures - 1), LONGEST_WAIT_SECONDS))

    def describe_failure(self, error: Exception) -> None:
        if self.num_failures == 0:
            say(
                f"Warning: {self.tracker.name} does not take the metrics ({summarize(error)}): they are kept in "
                f"{self.journal} and sent when it does; {advise(error)}."
            )

    def describe_return(self) -> None:
        if self.num_failures:
            say(f"{self.tracker.name} is back, and has got what it missed.")


def advise(error: Exception) -> str:
    """What to change, by what the libraries say of it."""
    text = " ".join(f"{type(cause).__name__} {cause}" for cause in chain(error))
    if FULL_DISK.search(text) or any(
        isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in chain(error)
    ):
        return "make room where it stores them"
    if REFUSAL.search(text):
        return "give credentials that may write there"
    return "check its address, and that the job's network leads there"


def say(text: str) -> None:
    print(f"{hide_secrets(text)}\n", end="", flush=True)  # in one write, or the workers' lines could come between
