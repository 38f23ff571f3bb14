# SPDX-License-Identifier: Apache-2.0
"""The program of a helper process: it loads one reward function, and calls it for each line that comes in.

    python -P -m llm_trainer.rewards.helper

Each line in and out is one JSON object. A line in has a number and a request, and its answer has the same number. The
first request says which function. What it prints goes to standard error, and its standard input is empty: neither
meets the protocol.
"""

import asyncio
import faulthandler
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.rewards.built_in import BUILDERS, Completion, read_text
from llm_trainer.rewards.own_function import OWN_ARGUMENTS, call_function, load_function

MAX_BUILT_IN_BYTES = 4 * 2**30  # of address space: an expression may stand for a number that fills any memory
TRACE_SIGNAL = signal.SIGUSR1  # has this process print where it is, and end
Answerer = Callable[[dict[str, Any]], dict[str, Any]]  # from a request to its answer


def main() -> None:
    """Load the function that the first line names, and answer the lines that follow. Ends with standard input."""
    requests, answers = take_pipes()
    log.escape_unprintable()
    faulthandler.register(TRACE_SIGNAL, all_threads=False, chain=True)  # chained: then it ends this process
    with asyncio.Runner() as runner:
        first = json.loads(requests.readline())
        try:
            answer = build_answerer(first["request"], runner)
        except UserError as error:
            write_answer(answers, {"problem": str(error)}, first["number"])
            return
        write_answer(answers, {}, first["number"])
        for line in requests:
            asked = json.loads(line)
            write_answer(answers, answer(asked["request"]), asked["number"])


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes of the protocol, which nobody else finds, and connect the standard ones to null and the log."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    return requests, answers


def write_answer(answers: BinaryIO, answer: Mapping[str, Any], number: int) -> None:
    """Write one line, with the number of the request. What JSON lacks is written as text."""
    answers.write(json.dumps({**answer, "number": number}, default=str).encode() + b"\n")
    answers.flush()


def build_answerer(choice: Mapping[str, Any], runner: asyncio.Runner) -> Answerer:
    """Return a function from a request to its answer. Raises UserError where the reward cannot be loaded."""
    if choice["file"] is None:
        return build_judge(choice)
    function = load_function(choice)
    return lambda request: call_function(function, {**choice["options"], **request}, runner, choice["file"])


def build_judge(choice: Mapping[str, Any]) -> Answerer:
    """Return a function that answers with the reward of one completion, by a built-in function.

    Beyond the CPU seconds of a row, the kernel ends this process: no code of Python would be heard in a computation.
    """
    try:
        judge = BUILDERS[choice["name"]](**choice["options"])
    except ImportError as error:
        raise UserError(
            f"reward_functions={choice['entry']!r} needs a package that is missing ({quote_error(error)}): use this "
            "project's image, or install its requirements."
        ) from error
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BUILT_IN_BYTES, MAX_BUILT_IN_BYTES))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        (completion,), (ids,) = request.pop("completions"), request.pop("completion_ids")
        row = {name: values[0] for name, values in request.items() if name not in OWN_ARGUMENTS}
        try:
            with limit_cpu(choice["row_cpu_seconds"]):
                return {"rewards": [judge(Completion(read_text(completion), len(ids), row))]}
        except UserError as error:
            return {"error": str(error), "row": 0}

    return answer


@contextmanager
def limit_cpu(seconds: float) -> Iterator[None]:
    """End this process by SIGPROF where the block computes for longer. Waiting does not count."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
