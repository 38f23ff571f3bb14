# SPDX-License-Identifier: Apache-2.0
"""A log is plain lines in a file, and has a bar below it on a terminal."""

import io
import sys

import pytest

from llm_trainer.aws.screen import Screen

LINES = ["train_loss=0.5; step=5", "Progress: step 5 of 20 (25 %); 3 s a step; 1 min left", "\x1b]0;forged\x07"]


class Terminal(io.StringIO):
    """A stream that a person reads."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_lines_are_shown_as_they_were_written(monkeypatch, stream, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", stream())
    with Screen() as screen:
        for line in LINES:
            screen.show(line)
    assert screen.terminal.getvalue().splitlines() == [*LINES[:2], "\\x1b]0;forged\\x07"]


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Screen() as screen:
        for line in LINES:
            screen.show(line)
    text = screen.terminal.getvalue()
    assert "step 5 of 20" in text and "1 min left" in text
    assert "Progress: step" not in text
    assert "train_loss=0.5; step=5" in text
    assert "\x1b]0;forged" not in text
