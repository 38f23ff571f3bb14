# SPDX-License-Identifier: Apache-2.0
"""The log of a job: whole lines on standard output and error, without secrets.

CloudWatch shows each line by itself, so that a carriage return would hide or join lines.
"""

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


def write_line(stream: TextIO, text: str) -> None:
    """Write a text and its line break at once: lines of several processes must not mix."""
    whole = hide_secrets(text).replace("\r\n", "\n").replace("\r", " ")
    stream.write(f"{whole}\n")
    stream.flush()
