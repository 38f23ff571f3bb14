# SPDX-License-Identifier: Apache-2.0
"""The log of a job: whole lines on standard output and error, without secrets, and none that users' words can forge.

CloudWatch shows each line by itself, and SageMaker reads metrics from it by regular expressions. So control characters
are shown by their codes, what follows a line break is indented, and a metric that no `metric_line` printed is broken.
"""

import atexit
import io
import re
import sys
import threading
from contextlib import suppress
from typing import TextIO

from llm_trainer.common.metric_definitions import list_all_names
from llm_trainer.common.ranks import rank
from llm_trainer.common.redaction import hide_secrets

# All but tab and line feed: codes of terminals, other line breaks, marks that turn the direction of writing round.
CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL = re.compile(f"[{CONTROLS}]")
CONTROL_BUT_COLOURS = re.compile(rf"(?!\x1b\[[0-9;]*m)[{CONTROLS}]")  # on a terminal, whose reader wants ours
METRIC = re.compile(rf"(^|; )({'|'.join(list_all_names())})=(?=-?[0-9.])", re.MULTILINE)  # as SageMaker reads it
MAX_HELD_CHARACTERS = 1 << 16  # of a line that does not end


def info(*lines: str, every_rank: bool = False) -> None:
    """Print lines on standard output. Only global rank 0 speaks, unless `every_rank` is set."""
    if every_rank or rank() == 0:
        for line in lines:
            write_line(sys.stdout, line)


def warning(text: str, every_rank: bool = False) -> None:
    """Print a line that begins with `Warning:` on standard output. Only global rank 0 speaks by default."""
    info(f"Warning: {text}", every_rank=every_rank)


def error(text: str) -> None:
    """Print a text on standard error, from every rank."""
    write_line(sys.stderr, text)


def escape_unprintable() -> None:
    """Have this process's streams write characters that their encoding lacks as escapes.

    A name that is not UTF-8, or any name under LANG=C, would otherwise end the job in the middle of a print.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put its own in their place
            stream.reconfigure(errors="backslashreplace")


def metric_line(line: str) -> None:
    """Print a line of numbers, from which SageMaker takes metrics: the only one that it takes them from."""
    if rank() == 0:
        stream = find_terminal()
        stream.write(f"{line}\n")
        stream.flush()


def find_terminal() -> TextIO:
    """Return the standard output below the guard, for one who draws on a terminal and prints nobody else's words."""
    return sys.stdout.stream if isinstance(sys.stdout, GuardedStream) else sys.stdout


def write_line(stream: TextIO, text: str) -> None:
    """Write a text and its line break at once: lines of several processes must not mix."""
    first, *others = clean_text(text, stream.isatty()).split("\n")
    lines = [first, *(line and f"  {line}" for line in others)]
    encoding = stream.encoding or "utf-8"
    stream.write(("\n".join(lines) + "\n").encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def clean_text(text: str, for_terminal: bool = False) -> str:
    """Return a text without secrets, control characters and anything that SageMaker would take for a metric."""
    return METRIC.sub(r"\1\2 =", show_plainly(text, for_terminal))


def show_plainly(text: str, for_terminal: bool = False) -> str:
    """Return a text without secrets, and with the codes of control characters in their place.

    On a terminal, colours stay.
    """
    plain = hide_secrets(text).replace("\r\n", "\n").replace("\r", " ")
    return (CONTROL_BUT_COLOURS if for_terminal else CONTROL).sub(show_code, plain)


def show_line(text: str) -> str:
    """Return a text on one line, without secrets, and with the codes of control characters in their place."""
    return show_plainly(text).replace("\n", " ")


def show_code(match: re.Match[str]) -> str:
    """Return the code of a matched character, as Python writes it."""
    return match[0].encode("unicode_escape").decode()


class GuardedStream(io.TextIOBase):
    """A stream that cleans whatever is written to it, line by line: words of libraries, warnings, tracebacks."""

    def __init__(self, stream: TextIO) -> None:
        """Take the stream that cleaned lines go to."""
        self.stream = stream
        self.held = ""  # the beginning of a line
        self.lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write the lines that end in the text, and hold what is behind them."""
        with self.lock:
            lines, line_break, self.held = (self.held + text).rpartition("\n")
            if line_break:
                self.stream.write(clean_text(lines, self.isatty()) + line_break)
            if len(self.held) > MAX_HELD_CHARACTERS:
                self.end_line()
        return len(text)

    def end_line(self) -> None:
        """Write what is held, as a line."""
        with self.lock:
            held, self.held = self.held, ""
            if held:
                self.stream.write(clean_text(held, self.isatty()) + "\n")
                self.stream.flush()

    def flush(self) -> None:
        """Flush the stream. A line that has not ended stays held: half of a secret would not be known."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Tell whether a person reads the stream on a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self.stream.fileno()

    def writable(self) -> bool:
        """Return true: that is what it is for."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """The way in which the stream writes characters that its encoding lacks."""
        return self.stream.errors

    @property
    def buffer(self) -> object:
        """The stream of bytes below, which nothing cleans."""
        return self.stream.buffer


def guard_output() -> None:
    """Clean all that this process prints from now on, by whatever means of Python. Called once, at its beginning."""
    escape_unprintable()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, GuardedStream):
            guarded = GuardedStream(stream)
            setattr(sys, name, guarded)
            atexit.register(end_quietly, guarded)


def end_quietly(stream: GuardedStream) -> None:
    """Write what a stream holds when the process ends, if anybody is still there to read it."""
    with suppress(OSError, ValueError):
        stream.end_line()
