# SPDX-License-Identifier: Apache-2.0
"""A DataLoader's process that cannot hand over a batch ends, so that the training fails where it would wait forever."""

import os
import signal
from multiprocessing.queues import Queue


def end_process_on_lost_batch() -> None:
    """Have a DataLoader's process end when one of its threads cannot hand over a batch, as for want of /dev/shm.

    Python only prints such an error, and the training process would wait for the batch forever.
    """
    print_error = Queue._on_queue_feeder_error  # type: ignore[attr-defined]

    def end_process(error: Exception, batch: object) -> None:
        from torch.utils.data import get_worker_info  # here, because a worker's first seconds need no torch

        print_error(error, batch)
        if get_worker_info() is None:
            return
        if isinstance(error, RuntimeError | OSError):
            os.kill(os.getpid(), signal.SIGBUS)  # PyTorch's message in the training process then names shared memory
        else:
            os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(end_process)  # type: ignore[attr-defined]
