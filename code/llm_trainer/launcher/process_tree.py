# SPDX-License-Identifier: Apache-2.0
"""Run a command whose whole tree of processes ends when the process that started this one ends.

    python -P -m llm_trainer.launcher.process_tree PARENT COMMAND [ARGUMENT ...]

A user's script starts processes that we do not know. The kernel's death signal would reach the first of them alone.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil

from llm_trainer.common.processes import PYTHON, bind_to_parent

DEATH_SIGNAL = signal.SIGUSR1  # one that can be caught, and that means nothing else here


def build_tree_command(command: list[str]) -> list[str]:
    """Return a command that ends with this process, and all processes below it too."""
    return [*PYTHON, "-m", "llm_trainer.launcher.process_tree", str(os.getpid()), *command]


def main() -> int:
    """Run the command of this process's arguments. Return its exit code, or die of the signal that it died of."""
    signal.signal(DEATH_SIGNAL, end_tree)
    bind_to_parent(int(sys.argv[1]), DEATH_SIGNAL)
    exit_code = subprocess.Popen(sys.argv[2:]).wait()
    if exit_code < 0:
        os.kill(os.getpid(), -exit_code)
    return exit_code


def end_tree(signum: int, frame: FrameType | None) -> None:
    """Kill all processes below this one, then this one. What is started meanwhile is killed too."""
    while below := [child for child in psutil.Process().children(recursive=True) if is_alive(child)]:
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # it starts nothing more, and its children keep their parent until they are listed
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    os._exit(1)


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process has not ended yet. A zombie has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main())
