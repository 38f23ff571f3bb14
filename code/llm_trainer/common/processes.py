# SPDX-License-Identifier: Apache-2.0
"""How a process of the job ends, together with others."""

import atexit
import ctypes
import os
import signal
import sys
from multiprocessing.queues import Queue
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


def die_of_lost_batches() -> None:
    """Have a DataLoader's process end when a thread of it cannot hand over a batch, for want of /dev/shm say.

    Python only prints such an error, and the training process would wait for the batch forever.
    """
    on_error = Queue._on_queue_feeder_error  # type: ignore[attr-defined]

    def end_process(error: Exception, batch: object) -> None:
        from torch.utils.data import get_worker_info

        on_error(error, batch)  # prints it
        if get_worker_info() is None:
            return
        if isinstance(error, RuntimeError | OSError):
            os.kill(os.getpid(), signal.SIGBUS)  # what PyTorch, in the training process, puts down to shared memory
        else:
            os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end_process)  # type: ignore[attr-defined]
