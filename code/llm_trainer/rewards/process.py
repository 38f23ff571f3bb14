# SPDX-License-Identifier: Apache-2.0
"""The worker's side of a helper process: started, asked within a time, heard, and ended with all that it started."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.processes import PYTHON, SAFE_PATH, bind_command
from llm_trainer.config.secret_references import withhold_secrets
from llm_trainer.rewards.helper import TRACE_SIGNAL

MAX_ANSWER_BYTES = 16 * 2**20
MAX_PRINTED_BYTES = 16 * 2**10  # in one call
CHUNK_BYTES = 2**16
STRAY = "wrote into the pipe of its answers"
MAX_DRAINED_CHUNKS = 64
END_SECONDS = 2.0  # within which a process that prints a trace, or has closed its pipe, ends by itself


class HelperFault(Exception):  # noqa: N818 (it names what is wrong)
    """A helper process that gave no answer. The text is the rest of a sentence."""


class SilentHelper(HelperFault):
    """A helper process that gave no answer in time."""


class EndedHelper(HelperFault):
    """A helper process that has ended. `exit_code` is negative for a signal."""

    def __init__(self, exit_code: int) -> None:
        """Say how the process ended."""
        self.exit_code = exit_code
        if exit_code == -signal.SIGKILL:
            text = "was killed by SIGKILL, most likely because the host ran out of memory"
        elif exit_code < 0:
            text = f"was ended by {signal.Signals(-exit_code).name}"
        else:
            text = f"ended its process with exit code {exit_code}"
        super().__init__(text)


def build_variables() -> dict[str, str]:
    """Return the environment of a helper process: this one's, without GPUs and the secrets that the job has."""
    own = {
        "CUDA_VISIBLE_DEVICES": "",  # the memory plan counts on all of a GPU
        "PYTHONHASHSEED": "0",  # sets have the same order after a resume, too
        "PYTHONUNBUFFERED": "1",
    }
    return {**withhold_secrets(os.environ, uses=()), **SAFE_PATH, **own}


class HelperProcess:
    """A process that answers lines of JSON by lines of JSON. It ends with this one, however early that ends."""

    def __init__(self, name: str) -> None:
        """Start the process. `name` begins each line that it prints."""
        pipe = subprocess.PIPE
        self.name = name
        self.child = subprocess.Popen(
            bind_command([*PYTHON, "-m", "llm_trainer.rewards.helper"]),
            bufsize=0,
            env=build_variables(),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,  # a terminal's Ctrl-C is not for it, and a kill reaches what it has started
        )
        assert self.child.stdin is not None and self.child.stdout is not None and self.child.stderr is not None
        self.requests, self.answers, self.output = self.child.stdin, self.child.stdout, self.child.stderr
        self.selector = selectors.DefaultSelector()
        for stream in (self.requests, self.answers, self.output):
            os.set_blocking(stream.fileno(), False)
        self.selector.register(self.answers, selectors.EVENT_READ)
        self.selector.register(self.output, selectors.EVENT_READ)
        self.answer, self.line = bytearray(), bytearray()
        self.num_printed_bytes = 0
        self.number = 0  # of the request

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer to a request. Raises HelperFault where none comes in time, or the process ends.

        What the process prints is read meanwhile. It never waits for a reader.
        """
        self.number += 1
        unsent = memoryview(json.dumps({"number": self.number, "request": request}).encode() + b"\n")
        deadline = time.monotonic() + seconds
        self.num_printed_bytes = 0
        self.selector.register(self.requests, selectors.EVENT_WRITE)
        while b"\n" not in self.answer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise SilentHelper(f"gave no answer within {seconds:g} seconds")
            unsent = self.exchange(unsent, left)
        line, _, rest = bytes(self.answer).partition(b"\n")
        self.answer.clear()
        answer = parse_answer(line)
        if unsent or rest or answer.get("number") != self.number:
            raise HelperFault(STRAY)
        return answer

    def exchange(self, unsent: memoryview, seconds: float) -> memoryview:
        """Wait until something can be sent or read, do so, and return what is left to send. Raises HelperFault."""
        ready = {key.fileobj for key, _ in self.selector.select(seconds)}
        if self.output in ready:
            self.read_output()
        if self.answers in ready:
            self.read_answer()
        if self.requests in ready:
            with suppress(BrokenPipeError):  # the end of its answers tells
                unsent = unsent[os.write(self.requests.fileno(), unsent[:CHUNK_BYTES]) :]
            if not unsent:
                self.selector.unregister(self.requests)
        return unsent

    def read_answer(self) -> None:
        """Add to the answer. Raises EndedHelper at the end of all answers, HelperFault where one grows too long."""
        chunk = os.read(self.answers.fileno(), CHUNK_BYTES)
        if not chunk:
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(END_SECONDS)
            self.close()
            raise EndedHelper(self.child.returncode)
        self.answer += chunk
        if len(self.answer) > MAX_ANSWER_BYTES:
            raise HelperFault(f"answered with more than {MAX_ANSWER_BYTES // 2**20} MiB")

    def read_output(self) -> bool:
        """Log the lines that have come, as far as a call may print. Return whether more may come."""
        chunk = os.read(self.output.fileno(), CHUNK_BYTES)
        if not chunk:
            self.selector.unregister(self.output)
            chunk = b"\n" if self.line else b""
        room = MAX_PRINTED_BYTES - self.num_printed_bytes
        self.num_printed_bytes += len(chunk)
        if 0 <= room < len(chunk):
            chunk = chunk[:room] + b"\n(What it prints beyond is left out of the log.)\n"
        elif room < 0:
            return bool(chunk)
        lines, line_break, rest = (bytes(self.line) + chunk).rpartition(b"\n")
        self.line = bytearray(rest)
        if line_break:
            log.info(f"{self.name}: {lines.decode(errors='backslashreplace')}", every_rank=True)
        return bool(chunk)

    def trace(self) -> None:
        """Have a process that hangs print where it is, and end. What comes within some time reaches the log."""
        self.drain_output()  # a full pipe would keep the trace waiting
        self.num_printed_bytes = 0
        self.child.send_signal(TRACE_SIGNAL)
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(END_SECONDS)

    def drain_output(self) -> None:
        """Log what a full pipe holds, and no more: somebody may print for ever."""
        with suppress(BlockingIOError, KeyError):  # nothing more is there; or its end has been read before
            for _ in range(MAX_DRAINED_CHUNKS):
                if not self.read_output():
                    return

    def close(self) -> None:
        """Kill the process, and what it has started in its session. What it has printed last reaches the log."""
        if self.answers.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.drain_output()
        self.selector.close()
        for stream in (self.requests, self.answers, self.output):
            stream.close()


def parse_answer(line: bytes) -> dict[str, Any]:
    """Return an answer's object. Raises HelperFault for another line: a function may write where it should not."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise HelperFault(STRAY)
    return answer
