# SPDX-License-Identifier: Apache-2.0
"""Threads that keep trackers up to date with the journal, each from an offset of its own.

A tracker that is down, slow or broken holds up nobody. When it is back it gets what it missed, with times and steps.
"""

import errno
import itertools
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llm_trainer.common import log
from llm_trainer.common.errors import quote_error, walk_causes
from llm_trainer.common.retry import Backoff
from llm_trainer.journal.journal import read_records
from llm_trainer.journal.records import EndStatus, JobRecord, Record

POLL_SECONDS = 1.0
RECORDS_A_BATCH = 100
FIRST_WAIT_SECONDS = 2.0  # after a failure; doubled after each
LONGEST_WAIT_SECONDS = 60.0
LAST_ATTEMPTS = 3  # of a tracker that fails when the job is over
FULL_DISK = re.compile(r"No space left|disk (is )?full|quota exceeded", re.IGNORECASE)
UNREACHABLE = "check its address, and that the job's network leads there"


def match_answer(numbers: str, words: str) -> re.Pattern[str]:
    """Return the pattern of an answer by HTTP: its number, as libraries write it, or one of these words."""
    return re.compile(
        rf"(code|HTTP|status|error|failed|many):? ({numbers})\b|\b({numbers}) (Client|Server) Error|{words}", re.I
    )


# What the libraries say, and what to change. The first that fits counts.
ADVICE = (
    (FULL_DISK, "make room where it stores them"),
    (re.compile(r"ProxyError|Tunnel connection failed"), UNREACHABLE),
    (
        re.compile(r"tracking server.*(not be found|not found|not exist|stopp|not active|inactive)", re.IGNORECASE),
        "start that tracking server, or correct its ARN",
    ),
    (
        match_answer("401|403", "Unauthori|not authori|Forbidden|Denied|credential|expired|api.?key|authenti"),
        "give credentials that may write there",
    ),
    (re.compile(r"must be in (the )?'active'"), "restore what was deleted there"),
    (
        match_answer("404", "NOT_FOUND|DOES_NOT_EXIST|not in a valid JSON format"),
        "check that its address leads to the tracker itself, and that nothing was deleted there",
    ),
    (
        match_answer("429", "LIMIT_EXCEEDED|RESOURCE_EXHAUSTED|Throttl|too many requests"),
        "it takes fewer requests than that: raise its limits if this lasts",
    ),
    (
        match_answer("50[0-4]", "INTERNAL_ERROR|TEMPORARILY_UNAVAILABLE|DEADLINE_EXCEEDED"),
        "it answers and fails: look into its own log",
    ),
    (
        re.compile(r"certificate", re.IGNORECASE),
        "give it a certificate that the image trusts, or the file of its authority in REQUESTS_CA_BUNDLE",
    ),
)


class TrackerUsageError(Exception):
    """A tracker was told what it can never take, such as a name with a forbidden character."""


class Tracker(Protocol):
    """A service or folder that is told of a run.

    Every method may raise whatever the tracker's library does, and is then called again. After a TrackerUsageError
    none is.
    """

    name: str  # for people

    def begin(self, job: JobRecord) -> str:
        """Make the job's run or continue it. Return where it is, for the log."""

    def send(self, records: Sequence[Record]) -> None:
        """Send some records that follow each other."""

    def upload(self, files: list[Path]) -> None:
        """Attach small files to the run."""

    def upload_model(self, folder: Path) -> None:
        """Attach the exported model to the run."""

    def end(self, status: EndStatus, reason: str | None) -> None:
        """End the run as the job has ended. `reason` is given where it failed."""


@dataclass
class Ending:
    """The end of the job, and what it leaves for the trackers. All feeds share it."""

    came: threading.Event = field(default_factory=threading.Event)
    status: EndStatus = "stopped"  # of a launcher that ended without a word
    reason: str | None = None
    files: list[Path] = field(default_factory=list)
    model_dir: Path | None = None  # to upload

    def note_status(self, status: EndStatus, reason: str | None) -> None:
        """Keep how the job ended, for when the end is announced."""
        self.status, self.reason = status, reason

    def announce(self, files: list[Path], model_dir: Path | None) -> None:
        """Tell the feeds that the job is over, and what to upload."""
        self.files, self.model_dir = files, model_dir
        self.came.set()


class Feed(threading.Thread):
    """A thread that keeps one tracker up to date with the journal."""

    def __init__(self, tracker: Tracker, journal: Path, since: float, ending: Ending) -> None:
        """Feed the records from `since` on, in seconds since the epoch: earlier ones are another job's."""
        super().__init__(daemon=True)  # one that hangs is left behind
        self.tracker, self.journal, self.since, self.ending = tracker, journal, since, ending
        self.offset = 0
        self.has_begun = self.uploads_model = self.is_done = False
        self.backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)

    def run(self) -> None:
        """Send records until the job is over and all are sent, or the last attempts have failed."""
        attempts_left = LAST_ATTEMPTS
        while not self.is_done and attempts_left > 0:
            is_over = self.ending.came.is_set()
            try:
                has_more = self.send_batch()
                if is_over and not has_more:
                    self.finish_run()
            except TrackerUsageError as error:
                log.warning(f"{self.tracker.name} is left out: {error}; all metrics are in {self.journal}.")
                self.is_done = True
            except Exception as error:  # whatever a tracker's library raises, here it ends
                self.log_failure(error)
                attempts_left -= is_over
                self.wait_after_failure()
            else:
                self.log_return()
                self.backoff.note_success()
                if not has_more and not is_over:
                    self.ending.came.wait(POLL_SECONDS)

    def send_batch(self) -> bool:
        """Send the next records, if there are any. Return whether there may be more of them."""
        new = ((record, end) for record, end in read_records(self.journal, self.offset) if record["time"] >= self.since)
        batch = list(itertools.islice(new, RECORDS_A_BATCH))
        records = [record for record, _ in batch]
        if not self.has_begun:
            job = next((record for record in records if record["kind"] == "job"), None)
            if job is None:  # the launcher has yet to write it
                return False
            where = self.tracker.begin(job)
            self.has_begun = True
            log.info(f"{self.tracker.name}: {where}")
        if batch:
            self.tracker.send(records)
            self.offset = batch[-1][1]
        return len(batch) == RECORDS_A_BATCH

    def finish_run(self) -> None:
        """Upload what the job leaves, and end the run."""
        if self.has_begun:
            self.tracker.upload(self.ending.files)
            if self.ending.model_dir is not None:
                self.uploads_model = True
                self.tracker.upload_model(self.ending.model_dir)
            self.tracker.end(self.ending.status, self.ending.reason)
        self.is_done = True

    def wait_after_failure(self) -> None:
        """Count a failure, and wait before the next attempt. The job's end cuts the wait short."""
        seconds = self.backoff.note_failure()
        if self.ending.came.is_set():
            time.sleep(FIRST_WAIT_SECONDS)
        else:
            self.ending.came.wait(seconds)

    def log_failure(self, error: Exception) -> None:
        """Say what failed and what to change, once until the tracker is back."""
        if self.backoff.num_failures == 0:
            log.warning(
                f"{self.tracker.name} does not take the metrics ({quote_error(error)}): they are kept in "
                f"{self.journal} and sent when it does; {choose_advice(error)}."
            )

    def log_return(self) -> None:
        """Say that the tracker is back, where it was away."""
        if self.backoff.num_failures:
            log.info(f"{self.tracker.name} is back, and has got what it missed.")


def choose_advice(error: Exception) -> str:
    """Return what to change, by what the libraries say about the error."""
    causes = list(walk_causes(error))
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return "make room where it stores them"
    text = " ".join(f"{type(cause).__name__} {cause}" for cause in causes)
    return next((advice for pattern, advice in ADVICE if pattern.search(text)), UNREACHABLE)
