# SPDX-License-Identifier: Apache-2.0
"""The log of a job: whole lines on standard output and error, without secrets.

CloudWatch shows each line by itself, so that a carriage return would hide or join lines.
"""

import io
import sys
from typing import TextIO

from llm_trainer.common.ranks import rank
from llm_trainer.common.redaction import hide_secrets


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


def write_line(stream: TextIO, text: str) -> None:
    """Write a text and its line break at once: lines of several processes must not mix."""
    whole = hide_secrets(text).replace("\r\n", "\n").replace("\r", " ")
    encoding = stream.encoding or "utf-8"
    stream.write(f"{whole}\n".encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
