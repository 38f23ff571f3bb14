# SPDX-License-Identifier: Apache-2.0
"""How a process of the job ends, together with others."""

import atexit
import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends: no orphan may go on writing checkpoints."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(exit_code: int) -> NoReturn:
    """End this process without the interpreter's tear-down, which takes seconds and in which torch's threads may abort.

    What libraries registered for the end, such as a tracker's last upload, is done first.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
