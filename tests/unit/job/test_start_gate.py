# SPDX-License-Identifier: Apache-2.0
"""A host's workers begin to train, or its launcher stops them before: never both."""

import subprocess
import sys

import pytest

from llm_trainer.job.start_gate import StartGate
from support.waiting import GUARD_SECONDS

PASS = """
import pathlib, sys
from llm_trainer.job.start_gate import StartGate
gate = StartGate(pathlib.Path(sys.argv[1]))
print("at the gate", flush=True)
gate.wait_or_pass()
"""


def begin_worker(folder):
    return subprocess.Popen([sys.executable, "-c", PASS, folder], stdout=subprocess.PIPE, text=True)


def test_where_a_worker_has_passed_the_launcher_comes_too_late(tmp_path):
    assert begin_worker(tmp_path).wait(GUARD_SECONDS) == 0
    assert not StartGate(tmp_path).close()


def test_a_closed_gate_holds_the_worker_until_another_attempt(tmp_path):
    gate = StartGate(tmp_path)
    assert gate.close()
    worker = begin_worker(tmp_path)
    assert worker.stdout.readline() == "at the gate\n"
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    gate.reset()
    assert worker.wait(GUARD_SECONDS) == 0
