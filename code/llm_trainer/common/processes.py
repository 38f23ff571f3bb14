# SPDX-License-Identifier: Apache-2.0
"""Ways for a process of the job to end, together with others."""

import atexit
import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. An orphan must not go on writing checkpoints."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_without_teardown(exit_code: int) -> NoReturn:
    """End this process after its exit handlers, without the rest of the interpreter's tear-down.

    The handlers are what libraries registered with `atexit`, such as a tracker's last upload. The tear-down takes
    seconds, and torch's threads may abort in it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
