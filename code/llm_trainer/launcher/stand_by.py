# SPDX-License-Identifier: Apache-2.0
"""Several processes on a node, where torchrun or srun has started one a device: the first leads, the others stand by.

The first starts a worker for each of them, as it does on SageMaker. So checks, restarts, stops and the report are the
same ones. The others hold no GPU. They end with the first, with its exit code, so that their launcher sees one end.
"""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import find_placement, read_environment
from llm_trainer.config.placement import Placement
from llm_trainer.job.job import collect_settings
from llm_trainer.launcher.stop_signal import find_early_stop

POLL_SECONDS = 0.1
LATE_SECONDS = 10.0  # the first, at its end, waits no longer for the others to come
TWICE = b"twice"


class Leader:
    """The first process of a node: while the block runs the others stand by, and at its end they are told how."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.exit_code = 1  # unless `end` says otherwise
        self.siblings: dict[int, socket.socket] = {}  # by local rank
        self.server: socket.socket | None = None

    def __enter__(self) -> Self:
        """Wait for the others from now on. Raises UserError where another process is the first of this node."""
        if self.placement.num_local > 1:
            self.server = socket.socket(socket.AF_UNIX)
            try:
                self.server.bind(name_socket(self.placement))
            except OSError as error:
                self.server.close()
                raise UserError(
                    "Two processes of this node were started with local rank 0 of the same job: give each its own."
                ) from error
            self.server.listen(self.placement.num_local)
            threading.Thread(target=self.receive, args=[self.server], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Tell the others the exit code, those too that come a little later."""
        if self.server is None:
            return
        deadline = time.monotonic() + LATE_SECONDS
        while len(self.siblings) < self.placement.num_local - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        missing = set(range(1, self.placement.num_local)) - self.siblings.keys()
        if missing:
            ranks = ", ".join(map(str, sorted(missing)))
            log.warning(f"no process with local rank {ranks} came: this one has started the workers of all devices.")
        for line in self.siblings.values():
            with suppress(OSError):  # it was killed
                line.sendall(str(self.exit_code).encode())
                line.close()
        self.server.close()

    def end(self, exit_code: int) -> int:
        """Note the exit code that the others end with, and return it."""
        self.exit_code = exit_code
        return exit_code

    def receive(self, server: socket.socket) -> None:
        """Keep the connection of each of the others; a second one of the same rank is told so."""
        while True:
            try:
                line, _ = server.accept()
                local_rank = int(line.recv(16))
            except (OSError, ValueError):  # closed at the end
                if server.fileno() < 0:
                    return
                continue
            if self.siblings.setdefault(local_rank, line) is not line:
                with suppress(OSError):
                    line.sendall(TWICE)
                line.close()


def run_once_a_node(arguments: Sequence[str], lead: Callable[[Placement], int]) -> int:
    """Run a function in the first process of this node while the others wait, and return its exit code in all.

    `arguments` are the command line's settings. Raises UserError where the processes of the node do not come together.
    """
    placement = find_placement()
    if placement.local_rank > 0:
        settings, _ = collect_settings(read_environment(), arguments)
        return stand_by(placement, settings.parallelism.host_timeout_seconds)
    with Leader(placement) as leader:
        return leader.end(lead(placement))


def stand_by(placement: Placement, timeout: float) -> int:
    """Wait for the end of this node's first process, and return its exit code.

    Raises UserError where it does not come within `timeout` seconds, is killed, or knows this process's rank already.
    """
    with connect(placement, timeout) as line:
        line.sendall(str(placement.local_rank).encode())
        answer = line.recv(16)
    if answer == TWICE:
        raise UserError(
            f"Two processes of this node were started with local rank {placement.local_rank} of the same job: give "
            "each its own."
        )
    if not answer:
        raise UserError(
            "The process with local rank 0 on this node was killed, most likely because the host ran out of memory."
        )
    return int(answer)


def connect(placement: Placement, timeout: float) -> socket.socket:
    """Return a connection to the first process of this node. Raises UserError where it does not come in time."""
    deadline = time.monotonic() + timeout
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(name_socket(placement))
        except OSError:
            line.close()
        else:
            return line
        if find_early_stop() or time.monotonic() > deadline:
            raise UserError(
                f"No process with local rank 0 came within {timeout:.0f} s on this node, where one has local rank "
                f"{placement.local_rank}: start all {placement.num_local} processes of a node in one network "
                "namespace, or one process a node."
            )
        time.sleep(POLL_SECONDS)


def name_socket(placement: Placement) -> bytes:
    """Return the name at which the processes of a node meet. It is no file, and ends with the process that has it."""
    facts = [os.getuid(), placement.num_nodes, placement.node_rank, placement.first_address, placement.job]
    return b"\0llm-trainer-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest().encode()
