# SPDX-License-Identifier: Apache-2.0
"""Mistakes that a user can mend, and the failure file in which SageMaker looks for the reason of a failed job."""

import sys
from pathlib import Path

MAX_FAILURE_CHARACTERS = 1024  # SageMaker shows no more than this of output/failure as the job's FailureReason
MAX_LISTED_PROBLEMS = 20


class UserError(Exception):
    """One or more mistakes of the user, one sentence each: key or file, value found, rule, fix. Never a traceback."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__(describe(problems))


def describe(problems: tuple[str, ...]) -> str:
    """All problems as text, the first sentence first, because SageMaker and people read only the beginning."""
    if len(problems) == 1:
        return problems[0]
    listed = [f"- {problem}" for problem in problems[1:MAX_LISTED_PROBLEMS]]
    unlisted = len(problems) - MAX_LISTED_PROBLEMS
    if unlisted > 0:
        listed.append(f"- and {unlisted} more.")
    return "\n".join([f"{problems[0]} ({len(problems)} problems in all, the others below.)", *listed])


def write_failure(output_dir: Path, reason: str) -> None:
    """Write output/failure, at most 1,024 characters. The first writer wins: its error caused the later ones.

    Where it cannot be written, the log says so: the reason itself is in the log already.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with open(output_dir / "failure", "x", encoding="utf-8") as file:
            file.write(reason[:MAX_FAILURE_CHARACTERS])
    except FileExistsError:
        return
    except OSError as error:
        print(f"The failure file could not be written: {error}", file=sys.stderr, flush=True)
