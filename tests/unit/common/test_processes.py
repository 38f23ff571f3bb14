# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import psutil

from support.waiting import GUARD_SECONDS, wait_until

CHILD = """
import os, time
from llm_trainer.common.processes import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
LEAVING = """
import atexit, threading, time
from llm_trainer.common.processes import exit_without_teardown
threading.Thread(target=time.sleep, args=[600]).start()
atexit.register(print, "uploaded")
exit_without_teardown(3)
"""


def test_exit_handlers_run_and_a_thread_holds_nothing_up():
    result = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=GUARD_SECONDS, check=False
    )
    assert (result.returncode, result.stdout) == (3, "uploaded\n")


def test_a_child_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
