# SPDX-License-Identifier: Apache-2.0
"""llm-trainer, steered where one GPU would not go by itself: `python steered.py WAYS train ...`.

WAYS are names, separated by commas:
  torchrun   one process, which torchrun starts: it joins a group of one rank over NCCL
  fsdp       as torchrun, and distribution=fsdp is let through with one process
  float8     base_compute=fp8 is let through without a GPU, and emulated
  cpu-proof  the export's checks find no free memory on the GPU, as with a model that is as large as the GPU

The launcher is run with small changes, and so are its workers, which it starts by this file.
"""

import socket
import sys
from pathlib import Path
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.processes import exit_without_teardown


def steer_launcher(ways: list[str]) -> None:
    """Have the launcher start its one worker by torchrun, or without it, and by this file."""
    from llm_trainer.launcher.worker_processes import WorkerProcesses

    worker = [sys.executable, "-P", str(Path(__file__).resolve()), ",".join(ways), "worker"]
    torchrun = [sys.executable, "-P", "-m", "llm_trainer.launcher.torchrun", "--nproc-per-node=1"]
    torchrun += [f"--master-port={find_free_port()}", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--", *worker] if {"torchrun", "fsdp"} & {*ways} else worker
    WorkerProcesses.build_command = lambda processes: command


def find_free_port() -> int:
    """Return a port that nobody listens at: torchrun's own is taken where two jobs run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def allow_fsdp_of_one() -> None:
    """Drop the rule that asks for several processes: shards of one are whole, and all of FSDP's code runs."""
    drop_rule("with one process")


def allow_float8_on_cpu(is_worker: bool) -> None:
    """Drop the rule that asks for a GPU, and the worker's own look at it."""
    drop_rule("base_compute=fp8 needs")
    if is_worker:
        from llm_trainer import worker

        configure = worker.configure_trackers

        def configure_and_steer(*settings: Any) -> None:
            configure(*settings)
            from llm_trainer.model import plan  # libraries that it imports read what was configured

            plan.check_float8 = lambda *_: None

        worker.configure_trackers = configure_and_steer


def drop_rule(words: str) -> None:
    """Drop the rule about the machines whose message holds these words."""
    from llm_trainer.config import checks

    rules = tuple(rule for rule in checks.HARDWARE_RULES if words not in rule.message)
    assert len(rules) == len(checks.HARDWARE_RULES) - 1
    checks.HARDWARE_RULES = rules


def hide_gpu_memory_from_checks() -> None:
    """Have `find_free_memory` return 0 for a GPU to callers in the package `export`."""
    from llm_trainer.model import device

    find = device.find_free_memory

    def find_less(place: device.Device) -> int:
        is_check = sys._getframe(1).f_globals["__name__"].startswith("llm_trainer.export")
        return 0 if is_check and place.is_gpu else find(place)

    device.find_free_memory = find_less  # before others import it by name


def main() -> int:
    """Run the launcher, or a worker, with the changes. Return its exit code."""
    ways, role = sys.argv[1].split(","), sys.argv[2]
    if "fsdp" in ways:
        allow_fsdp_of_one()
    if "float8" in ways:
        allow_float8_on_cpu(role == "worker")
    if role == "worker":
        if "cpu-proof" in ways:
            hide_gpu_memory_from_checks()
        from llm_trainer.worker import main as work

        return work()
    steer_launcher(ways)
    from llm_trainer.cli.main import main as launch

    del sys.argv[1]
    return launch()


if __name__ == "__main__":
    log.guard_output()
    exit_without_teardown(main())
