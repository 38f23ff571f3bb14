# SPDX-License-Identifier: Apache-2.0
"""Progress for people: lines in a log, a bar on a real pseudo-terminal, and none of it read as a metric."""

import os
import pty
import re
import sys
import time
import traceback
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from llm_trainer.common.metric_definitions import METRICS, define_metrics, format_line
from llm_trainer.training import progress
from llm_trainer.training.progress import Progress, choose_progress, show_seconds


def train(fails: bool = False) -> None:
    """40 steps, of which every tenth prints a metric line longer than the terminal is wide."""
    state = TrainerState(max_steps=40, is_world_process_zero=True)
    with choose_progress(time.time() - 3600, num_hosts=2) as callback:
        for step in range(1, 41):
            time.sleep(0.02)
            step_to(callback, state, step)
            if step % 10 == 0:
                print(format_line(dict.fromkeys(METRICS, 0.5) | {"step": step}), flush=True)
            if fails and step == 25:
                raise RuntimeError("the training failed")
        callback.on_train_end(None, state, TrainerControl())
    print("after the training")


def train_on_terminal(fails: bool = False, terminal: str = "xterm") -> str:
    """What a terminal of 80 columns gets to see."""
    process, screen = pty.fork()
    if process == 0:
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - and not what pytest has put there
        os.environ |= {"TERM": terminal, "COLUMNS": "80"}
        try:
            train(fails)
        except RuntimeError:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    seen = b""
    while True:
        try:
            seen += os.read(screen, 4096)
        except OSError:  # Linux's way to say that the other side is closed
            break
    os.close(screen)
    os.waitpid(process, 0)
    return seen.decode()


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def print_screen(seen: str) -> list[str]:
    """The lines that are left when cursor movements and erasures are carried out."""
    lines, row, column = [""], 0, 0
    for text, parameters, command in re.findall(r"([^\x1b]+)|\x1b\[([\d;?]*)([A-Za-z])", seen):
        if command == "A":
            row -= int(parameters or 1)
        elif command == "K":
            lines[row] = ""
        for character in text:
            if character == "\n":
                row += 1
            elif character == "\r":
                column = 0
            else:
                lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
                column += 1
            while row >= len(lines):
                lines.append("")
    return lines


@pytest.fixture
def state(monkeypatch):
    """A training of 400 steps, while the clock stands still."""
    now = time.time()
    monkeypatch.setattr(progress.time, "time", lambda: now)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1000.0)
    return TrainerState(max_steps=400, is_world_process_zero=True)


def step_to(callback: Progress, state: TrainerState, step: int) -> None:
    state.global_step = step
    callback.on_step_end(None, state, TrainerControl())


def test_a_line_tells_pace_end_and_cost(state, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EARLY_SECONDS", 0.0)
    callback = Progress(time.time() - 360, num_hosts=2)
    step_to(callback, state, 20)  # the first of this run, which went on from step 19
    callback.first_at -= 200
    step_to(callback, state, 120)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"Progress: step 120 of 400 \(30 %\); 2 s a step; 9 min 20 s left, until \d\d:\d\d UTC; "
        r"0.20 of about 0.51 instance-hours",
        line,
    )
    assert not any(re.search(definition["Regex"], line) for definition in define_metrics())


def test_lines_are_rare_and_rarer_later(state, capsys):
    callback = Progress(time.time(), num_hosts=1)
    for step in range(1, 300):
        step_to(callback, state, step)
    assert capsys.readouterr().out == ""
    callback.shown_at -= 11
    step_to(callback, state, 300)
    assert capsys.readouterr().out.startswith("Progress: step 300 of 400 (75 %); ")
    callback.began_at -= 121
    callback.shown_at -= 11
    step_to(callback, state, 301)
    assert capsys.readouterr().out == ""
    callback.shown_at -= 50
    step_to(callback, state, 302)
    assert capsys.readouterr().out.startswith("Progress: step 302 of 400 (75 %); ")


def test_the_last_line_of_a_run_that_was_stopped_extrapolates_nothing(state, capsys):
    callback = Progress(time.time() - 3600, num_hosts=3)
    for step in range(1, 134):
        step_to(callback, state, step)
    callback.on_train_end(None, state, TrainerControl())
    line = capsys.readouterr().out
    assert re.fullmatch(r"Progress: step 133 of 400 \(33 %\); [\d.e-]+ s a step; 3.00 instance-hours so far\n", line)


def test_other_ranks_say_nothing(state, capsys, monkeypatch):
    state.is_world_process_zero = False
    monkeypatch.setattr(progress, "EARLY_SECONDS", 0.0)
    callback = choose_progress(time.time(), num_hosts=1)
    for step in range(1, 10):
        step_to(callback, state, step)
    callback.on_train_end(None, state, TrainerControl())
    assert capsys.readouterr().out == ""


def test_without_a_terminal_there_are_no_control_characters(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EARLY_SECONDS", float("inf"))
    train()
    log = capsys.readouterr().out
    assert not re.search(r"[\r\x1b]", log)
    assert [line.split(";")[0] for line in log.splitlines() if "Progress" in line] == [
        "Progress: step 40 of 40 (100 %)"
    ]


def test_a_terminal_has_a_bar_below_whole_metric_lines():
    seen = train_on_terminal()
    screen = print_screen(seen)
    metric_lines = [line for line in screen if line.startswith("train_loss=")]
    assert [line.split("; ")[-2:] for line in metric_lines] == [
        [f"step={step}", "total_steps=0.5"] for step in (10, 20, 30, 40)
    ]
    (bar,) = [number for number, line in enumerate(screen) if line.startswith("step ")]
    assert bar == screen.index(metric_lines[-1]) + 1
    assert re.fullmatch(r"step 40 of 40 \S{50,} 100 % ?", plain(screen[bar]))
    assert re.fullmatch(r"[\d.e-]+ s a step; 2.00 instance-hours so far", screen[bar + 1])
    drawn = re.findall(r"step (\d+) of 40 +\S+ ", plain(seen))
    assert len(set(drawn)) > 2  # it moved
    assert seen.rstrip().endswith("after the training")
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # the cursor is back


def test_a_training_that_fails_leaves_the_terminal_in_order():
    seen = train_on_terminal(fails=True)
    assert "RuntimeError: the training failed" in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")


def test_a_dumb_terminal_has_lines():
    assert "Progress: step 40 of 40 (100 %)" in train_on_terminal(terminal="dumb")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (590, "9 min 50 s"), (7500, "2 h 5 min")]
)
def test_seconds(seconds, text):
    assert show_seconds(seconds) == text


@pytest.mark.parametrize("pause", ["on_evaluate", "on_save"])
def test_a_step_takes_the_mean_of_all_but_the_first_without_what_lies_between(monkeypatch, pause):
    moments = iter([0.0, 10.0, 12.0, 16.0, 99.0, 102.0])  # an evaluation or a checkpoint ends at 99
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(moments), time=time.time))
    callback = Progress(0.0, 1)
    monkeypatch.setattr(callback, "find_interval", lambda now: 1e9)
    state = TrainerState(max_steps=5, is_world_process_zero=True)
    getattr(callback, pause)(None, state, None)  # before the first step
    assert callback.step_seconds is None
    for step in range(1, 5):
        if step == 4:
            getattr(callback, pause)(None, state, None)
        step_to(callback, state, step)
    assert callback.step_seconds == 3.0
