# SPDX-License-Identifier: Apache-2.0
"""Mistakes that a user can mend, failures of a job, and the failure file that SageMaker reads."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm_trainer.common import log
from llm_trainer.common.redaction import hide_in, hide_secrets

# A mistake would happen again, a fault may not. Lost is a host that no longer answers, peer a failure's echo elsewhere.
Kind = Literal["mistake", "fault", "lost", "peer"]

MAX_FAILURE_CHARACTERS = 1024  # SageMaker shows no more than this of output/failure as the job's FailureReason
MAX_LISTED_PROBLEMS = 20
MAX_QUOTED_CHARACTERS = 300  # of a library's text or a user's value: the rest of the sentence must fit, too
RESERVED_BYTES = 16384
QUOTES_A_WORKER = "Original Traceback (most recent call last)"  # PyTorch quotes a DataLoader's process so


class UserError(Exception):
    """One or more mistakes of the user, one sentence each: key or file, value found, rule and fix.

    A sentence that several parts of a job found comes once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(list_problems(self.problems))


@dataclass(frozen=True)
class Wait:
    """A rank's wait for other ranks, in which it failed: a collective, or a meeting."""

    rank: int
    ranks: Sequence[int]  # all that had to come; none where they are not known
    what: str  # such as "all_reduce, collective 57 of its group"
    number: int  # among the collectives of its group of ranks, from 1; 0 for the meeting that comes before
    limit_seconds: float
    timed_out: bool  # it waited for so long, and was not broken off before


@dataclass(frozen=True)
class Failure:
    """A sentence for the user on why a process or a host failed."""

    reason: str
    kind: Kind
    time: float  # seconds since the epoch
    waits: Sequence[Wait] = ()  # of the ranks of a host that lost others


def parse_failure(words: Mapping[str, Any]) -> Failure:
    """Return the failure that was told as JSON. Raises TypeError for other words."""
    return Failure(**{**words, "waits": tuple(Wait(**wait) for wait in words.get("waits", ()))})


def choose_cause(failures: Iterable[Failure]) -> Failure | None:
    """Return the failure that caused the others: the first that is not an echo of one elsewhere."""
    weights = {"mistake": 0, "fault": 0, "lost": 1, "peer": 2}
    return min(failures, key=lambda failure: (weights[failure.kind], failure.time), default=None)


def reserve_failure(folder: Path, name: str) -> None:
    """Take the disk space for a failure now, because the disk may be full when there is one to report."""
    (folder / f".{name}").write_bytes(bytes(RESERVED_BYTES))


def report_failure(folder: Path, name: str, failure: Failure) -> None:
    """Leave a process's failure for the launcher, which alone writes output/failure, in the space reserved for it."""
    unfinished = folder / f".{name}"
    try:
        unfinished.touch()
        with unfinished.open("r+", encoding="utf-8") as file:
            json.dump(hide_in(asdict(failure)), file)
            file.truncate()
        unfinished.rename(folder / f"{name}.json")
    except OSError as error:
        log.error(f"{failure.reason}\nThis could not be left for the launcher: {error}")


def read_failures(folder: Path) -> list[Failure]:
    """Return the failures that processes left in a folder."""
    return [parse_failure(json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("*.json")]


def list_problems(problems: tuple[str, ...]) -> str:
    """Return all problems as one text. The first one comes first, as SageMaker and people read only the beginning."""
    if len(problems) == 1:
        return problems[0]
    listed = [f"- {problem}" for problem in problems[1:MAX_LISTED_PROBLEMS]]
    unlisted = len(problems) - MAX_LISTED_PROBLEMS
    if unlisted > 0:
        listed.append(f"- and {unlisted} more.")
    return "\n".join([f"{problems[0]} ({len(problems)} problems in all, the others below.)", *listed])


def walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, and those that it was raised from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def cut_quote(text: str) -> str:
    """Cut a text that is too long to be quoted in a sentence. Secrets go first: half of one would not be known."""
    text = hide_secrets(text)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def quote_error(error: BaseException) -> str:
    """Return the line of an error's text that says what happened, short enough to stand inside a sentence."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return cut_quote((lines[-1] if QUOTES_A_WORKER in text else lines[0]).rstrip(".:"))


def write_failure(output_dir: Path, reason: str) -> None:
    """Write output/failure, at most 1,024 characters. The first writer wins, as its error caused the later ones.

    It takes the space that `reserve_failure` took, if it did. What UTF-8 cannot hold is written as an escape. Where
    the file cannot be written the log says so. The reason itself is in the log already.
    """
    text = log.show_plainly(reason)[:MAX_FAILURE_CHARACTERS]
    reserved = output_dir / ".failure"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if (output_dir / "failure").exists():
            reserved.unlink(missing_ok=True)
            return
        reserved.touch()
        with reserved.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
        reserved.rename(output_dir / "failure")
    except OSError as error:
        log.error(f"The failure file could not be written: {error}")
