# SPDX-License-Identifier: Apache-2.0
"""A tree of processes of which we know only the first ends with the process that started it."""

import subprocess
import sys

import psutil
import pytest

from support.waiting import GUARD_SECONDS, wait_until

# A process whose child and grandchild leave its session, as torchrun's workers do.
GRANDCHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GRANDCHILD!r}], start_new_session=True)"
PARENT = """
import subprocess, sys
from llm_trainer.launcher.process_tree import build_tree_command
result = subprocess.run(build_tree_command([sys.executable, "-c", sys.argv[1]]))
print(result.returncode)
"""


def start(program):
    command = [sys.executable, "-c", PARENT, program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_all_below_end_with_the_process_that_started_them():
    parent = start(CHILD)
    grandchild = psutil.Process(int(parent.stdout.readline()))
    tree = [grandchild, *grandchild.parents()[:2]]
    parent.kill()
    parent.communicate(timeout=GUARD_SECONDS)
    for process in tree:
        wait_until(lambda process=process: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("program", "code"),
    [("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 15)", -15), ("print('x')", 0)],
)
def test_the_end_of_the_command_is_told(program, code):
    assert start(program).communicate(timeout=GUARD_SECONDS)[0].split()[-1] == str(code)
