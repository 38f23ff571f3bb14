# SPDX-License-Identifier: Apache-2.0
"""What the kernel is asked to do for a family of processes."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends: no orphan may go on writing checkpoints."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
