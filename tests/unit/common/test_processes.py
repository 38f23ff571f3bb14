# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import psutil

from llm_trainer.common import processes
from support.waiting import GUARD_SECONDS, wait_until

CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
PARENT = f"""
import subprocess, sys
from llm_trainer.common.processes import bind_command
subprocess.run(bind_command([sys.executable, "-c", {CHILD!r}]))
"""
# Starts a child and ends before the child can ask the kernel for a signal: the child waits for that.
HASTY = """
import os, sys
from llm_trainer.common.processes import bind_to_parent
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    pass
print(os.getpid(), flush=True)
bind_to_parent(parent)
print("an orphan goes on", flush=True)
"""
LEAVING = """
import atexit, threading, time
from llm_trainer.common.processes import exit_without_teardown
threading.Thread(target=time.sleep, args=[600]).start()
atexit.register(print, "uploaded")
exit_without_teardown(3)
"""
# Ends children that hang, as DataLoaders and pools do, and tells whether a stop signal of somebody else reaches them.
STOPPED = """
import multiprocessing, os, signal, subprocess, time
from llm_trainer.common.processes import end_children_by_kill
from llm_trainer.launcher.stop_signal import withhold_stops
end_children_by_kill()
with withhold_stops():
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600], daemon=True)
    forked.start()
    spawned = subprocess.Popen(["sleep", "600"])
for pid in (forked.pid, spawned.pid):
    os.kill(pid, signal.SIGTERM)
forked.join(0.2)
print(forked.exitcode, spawned.poll())
forked.terminate()
spawned.terminate()
forked.join()
print(forked.exitcode, spawned.wait())
"""


def run(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)


def test_exit_handlers_run_and_a_thread_holds_nothing_up():
    result = run(LEAVING)
    assert (result.returncode, result.stdout) == (3, "uploaded\n")


def test_a_child_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_whose_parent_ended_before_the_kernel_knew_ends_too():
    assert run(HASTY).stdout.split()[1:] == []


def test_a_bound_command_is_bound_before_it_imports_anything(tmp_path):
    """What the working folder, PYTHONPATH and the packages hold is not looked at, and takes no time."""
    (tmp_path / "ctypes.py").write_text("raise SystemExit('imported from the wrong place')")
    command = processes.bind_command([sys.executable, "-c", "print('begun')"])
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "begun\n")
    assert command[1:4] == ["-I", "-S", processes.__file__]


def test_every_process_is_started_by_a_command_that_is_bound():
    """A new place that starts processes shall say how they end with this one."""
    code = Path(processes.__file__).parents[1]
    starts = {str(file.relative_to(code)): file.read_text() for file in code.rglob("*.py")}
    starting = {name for name, text in starts.items() if "subprocess.Popen(" in text or "subprocess.run(" in text}
    bound = {name for name in starting if "bind_command(" in starts[name] or "build_tree_command(" in starts[name]}
    assert starting
    assert starting - bound == set()


def test_children_that_no_stop_signal_reaches_are_still_ended_by_their_parent():
    assert run(STOPPED).stdout.splitlines() == ["None None", "-9 -9"]
