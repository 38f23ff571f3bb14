# SPDX-License-Identifier: Apache-2.0
"""Work after the training is broken off by a stop, wherever it is, and not begun after one."""

import subprocess
import sys
import threading
import time

import pytest

from llm_trainer.export import stop_watch
from llm_trainer.export.stop_watch import Interruption, StopWatch
from support.waiting import GUARD_SECONDS, wait_until

# Work in a library that no signal interrupts: the stop comes, and the lock is never free.
STUCK = """
import pathlib, sys, threading
from llm_trainer.export import stop_watch
stop_watch.STUCK_SECONDS = 0.1
file = pathlib.Path(sys.argv[1])

def work():
    file.touch()
    while True:
        try:
            threading.Event().wait()
        except BaseException:
            print("swallowed", flush=True)

with stop_watch.StopWatch(file, False) as watch:
    watch.attempt("the work", work)
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "stop"


def test_work_without_a_stop_gives_its_result(file):
    with StopWatch(file, False) as watch:
        assert watch.attempt("the work", lambda: 7) == 7
        assert not watch.is_stopped
    assert watch.left_out == []


def test_work_is_broken_off_wherever_it_is_and_no_handler_of_errors_sees_that(file, capfd):
    begun, cleaned = threading.Event(), []

    def work():
        try:
            begun.set()
            time.sleep(GUARD_SECONDS)
        except Exception:
            cleaned.append("taken for an error")
        finally:
            cleaned.append("cleaned up")

    def stop():
        begun.wait()
        file.touch()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with StopWatch(file, False) as watch:
        assert watch.attempt("the comparison", work) is None
        assert watch.attempt("the merge", lambda: cleaned.append("begun")) is None
    stopper.join()
    assert cleaned == ["cleaned up"]
    assert watch.left_out == [
        "Left out, since the job was stopped: the comparison.",
        "Left out, since the job was stopped: the merge.",
    ]
    assert capfd.readouterr().out == "".join(f"Warning: {text}\n" for text in watch.left_out)


def test_a_stopped_training_begins_no_work(file):
    with StopWatch(file, True) as watch:
        assert watch.attempt("the work", lambda: pytest.fail("begun")) is None


def test_between_two_works_nothing_is_interrupted(file):
    with StopWatch(file, False) as watch:
        file.touch()
        watch.interrupt(stop_watch.INTERRUPT, None)
        watch.is_open = True
        with pytest.raises(Interruption):
            watch.interrupt(stop_watch.INTERRUPT, None)
        watch.interrupt(stop_watch.INTERRUPT, None)  # once is enough: what cleans up is not interrupted


def test_an_error_of_the_work_is_the_callers(file):
    with StopWatch(file, False) as watch, pytest.raises(ZeroDivisionError):
        watch.attempt("the work", lambda: 1 / 0)
    wait_until(lambda: not watch.thread.is_alive())


def test_work_that_cannot_be_broken_off_ends_with_the_process_and_its_result_stays(file):
    command = [sys.executable, "-c", STUCK, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "swallowed",
        "Warning: the job was stopped, and its work cannot be broken off: the result is in place.",
    ]
