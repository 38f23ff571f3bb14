# SPDX-License-Identifier: Apache-2.0
"""Ways for a process of the job to end, together with others.

This file is also a program, which runs a command that dies with the process that started it:

    python -I -S processes.py PARENT COMMAND [ARGUMENT ...]

Nothing but the standard library is imported: it runs within a few milliseconds.
"""

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)
# How a process of ours is started. By itself `python -m` imports from the working folder first: with a file peft.py
# there, that would run in the place of the library. The variable is for those that others start, such as torchrun.
PYTHON = (sys.executable, "-P")
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def bind_command(command: Sequence[str]) -> list[str]:
    """Return a command whose process dies with this one, however early this one is killed.

    The kernel keeps the death signal over exec, but not over fork: each process of a job is started by such a command.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def bind_to_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends. An orphan must not go on writing checkpoints.

    `parent` is the process id that the parent had. Where it has ended already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_children_by_kill() -> None:
    """Have `terminate` kill what this process starts, to which it hands on that it blocks stop signals.

    Otherwise a DataLoader or a pool would wait for ever for a process that hangs, and which they ended in vain.
    """
    import subprocess  # here, because `bind_command` starts this file within a few milliseconds
    from multiprocessing.popen_fork import Popen

    Popen.terminate = Popen.kill  # type: ignore[method-assign]
    subprocess.Popen.terminate = subprocess.Popen.kill  # type: ignore[method-assign]


def exit_without_teardown(exit_code: int) -> NoReturn:
    """End this process after its exit handlers, without the rest of the interpreter's tear-down.

    The handlers are what libraries registered with `atexit`, such as a tracker's last upload. The tear-down takes
    seconds, and torch's threads may abort in it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    bind_to_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
