# SPDX-License-Identifier: Apache-2.0
"""The last word of a launcher that fails in a way nobody foresaw: a sentence in output/failure, whatever happened.

SageMaker shows nothing else of a job that failed. What it needs is imported where it is used, since an import may be
what fails.
"""

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from llm_trainer.common import log
from llm_trainer.common.errors import reserve_failure, write_failure
from llm_trainer.config.environment import find_base_dir

if TYPE_CHECKING:
    from llm_trainer.common.errors import Failure


def run_to_an_answer(run: Callable[[], int]) -> int:
    """Run the launcher, and return its exit code. Whatever it raises becomes output/failure and exit code 1."""
    output_dir = find_base_dir() / "output"
    with contextlib.suppress(OSError):  # the check of the folders tells of one that cannot be written
        output_dir.mkdir(parents=True, exist_ok=True)
        reserve_failure(output_dir, "failure")
    try:
        return run()
    except BaseException as error:  # whatever it is, SageMaker must learn of it
        reason = explain_crash(error, "launcher").reason
        with contextlib.suppress(OSError):  # nobody reads the log any more
            log.error(reason)
        write_failure(output_dir, reason)
        return 1
    finally:
        with contextlib.suppress(OSError):
            (output_dir / ".failure").unlink(missing_ok=True)


def explain_crash(error: BaseException, program: str) -> "Failure":
    """Return the failure that an unforeseen exception means, after leaving its traceback in the log and in a file.

    A mistake of the user, and a file that is closed to the user, need none. `program` is the part of this package that
    ended, such as "launcher".
    """
    who = f"The {program}"
    try:
        from llm_trainer.common.errors import UserError
        from llm_trainer.job.failure_reasons import describe_refusal, explain, write_traceback

        if isinstance(error, UserError) or describe_refusal(error):
            return explain(error, who, None)
        name = f"{os.uname().nodename}-{program}.txt"
        log.error(write_traceback(error, find_base_dir() / "output" / "data" / "failures" / name))
        return explain(error, who, None)
    except BaseException:  # the package itself may be broken, or the memory gone
        from llm_trainer.common.errors import Failure

        with contextlib.suppress(Exception):
            traceback.print_exception(error, limit=20)
        return Failure(f"{who} failed with {type(error).__name__}: the log has the traceback.", "fault", time.time())
