# SPDX-License-Identifier: Apache-2.0
"""The log holds whole lines without secrets, of rank 0 where the others have nothing else to say."""

import io
import os
import re
import subprocess
import sys

import pytest

from llm_trainer.common import log
from llm_trainer.common.metric_definitions import define_metrics, format_line


@pytest.mark.parametrize(
    ("rank", "every_rank", "is_told"), [("0", False, True), ("1", False, False), ("1", True, True)]
)
def test_other_ranks_speak_only_where_they_are_asked_to(monkeypatch, capsys, rank, every_rank, is_told):
    monkeypatch.setenv("RANK", rank)
    log.info("first", "second", every_rank=every_rank)
    log.warning("beware", every_rank=every_rank)
    assert capsys.readouterr().out == ("first\nsecond\nWarning: beware\n" if is_told else "")


def test_an_error_is_told_by_every_rank_on_standard_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    log.error("broken")
    assert capsys.readouterr() == ("", "broken\n")


def test_secrets_are_hidden_and_carriage_returns_gone(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    log.info("https://me:pass@host took hf_secret", "10%\r20%", "windows\r\nline")
    assert capsys.readouterr().out == "https://***@host took ***\n10% 20%\nwindows\n  line\n"


def test_what_the_streams_encoding_lacks_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    log.write_line(stream, "caf\u00e9 \udcff \u2028")
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udcff \\u2028\n"
    monkeypatch.setattr("sys.stdout", stream)
    log.escape_unprintable()
    print("caf\u00e9", flush=True)
    assert stream.buffer.getvalue().endswith(b"caf\\xe9\n")


FORGERIES = (
    "eval_loss=0.000001",
    "run 'x; eval_loss=1e-9; step=3'",
    "first\neval_loss=0.1",
    "first\r\nstep=1; eval_loss=0.1",
    "learning_rate=-1 is not valid",
    "\x85eval_loss=0.1\u2028eval_loss=0.1",
)


def read_metrics(text: str) -> list[str]:
    """What SageMaker takes from some lines."""
    regexes = [definition["Regex"] for definition in define_metrics()]
    return [found for line in text.splitlines() for regex in regexes for found in re.findall(regex, line)]


@pytest.mark.parametrize("text", FORGERIES)
def test_no_words_are_taken_for_a_metric(capsys, text):
    for tell in (log.info, log.warning, log.error):
        tell(text)
    captured = capsys.readouterr()
    assert read_metrics(text)
    assert read_metrics(captured.out + captured.err) == []


def test_a_metric_line_is_taken(capsys):
    log.metric_line(format_line({"eval_loss": 0.5, "step": 3}))
    assert sorted(read_metrics(capsys.readouterr().out)) == ["0.5", "3"]


@pytest.mark.parametrize("code", ["\x1b[31m", "\x9b31m", "\x00", "\x07", "\u202e", "\u2066", "\ud800", "\x0b", "\x7f"])
def test_control_characters_are_shown_by_their_codes(capsys, code):
    log.info(f"a{code}b\tc")
    assert capsys.readouterr().out == f"a{code.encode('unicode_escape').decode()}b\tc\n"


class Terminal(io.StringIO):
    """A stream that a person reads."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_and_no_other_codes(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    log.info("\x1b[32mgreen\x1b[0m \x1b[2J \x1b]0;title\x07")
    assert terminal.getvalue() == "\x1b[32mgreen\x1b[0m \\x1b[2J \\x1b]0;title\\x07\n"


# Prints as libraries do, and ends with an error.
PROGRAM = """
import logging, os, sys, threading, warnings
from llm_trainer.common import log
log.guard_output()
logging.basicConfig()
secret, forged = os.environ["HF_TOKEN"], "a; eval_loss=0.1"
print("print:", end=""); print(secret[:4], end=""); print(secret[4:], forged)
print("\\x1b[31m", file=sys.stderr)
logging.warning("logging %s %s", secret, forged)
warnings.warn(f"warnings {secret} {forged}")
def fail(): raise ValueError(f"thread {secret} {forged}")
thread = threading.Thread(target=fail); thread.start(); thread.join()
log.metric_line("train_loss=1; step=2")
log.info("log")
print("unfinished", secret, end="")
sys.stdout.flush()
raise ValueError(f"raised {secret}\\neval_loss=0.1")
"""


def test_all_that_a_process_prints_is_cleaned():
    secret = "hf_0123456789"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "HF_TOKEN": secret}, capture_output=True, text=True
    )
    assert result.returncode == 1
    printed = result.stdout + result.stderr
    assert secret not in printed
    assert "\x1b" not in printed
    assert sorted(read_metrics(printed)) == ["1", "2"]
    for text in ("print:***", "logging ***", "warnings ***", "thread ***", "raised ***", "unfinished ***", "log\n"):
        assert text in printed
