# SPDX-License-Identifier: Apache-2.0
"""Call torchrun from Python: a worker that dies ends in a sentence of ours in place of torchrun's traceback.

    python -m llm_trainer.launcher.torchrun OPTIONS -- COMMAND

The command starts a worker, which dies with torchrun.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llm_trainer.common import log
from llm_trainer.common.processes import bind_command


def main() -> int:
    """Run torchrun with this process's arguments. Return 0 or 1, and report workers that died."""
    separator = sys.argv.index("--")
    options, command = sys.argv[1:separator], sys.argv[separator + 1 :]
    # SIGTERM does not reach workers (stop_signal.withhold_stops): torchrun would wait 30 s, then kill them after all.
    PContext.close.__defaults__ = (signal.SIGKILL, 0)
    try:
        run(parse_args([*options, "--no-python", *bind_command(command)]))
    except ChildFailedError as error:
        if "LLM_TRAINER_SCRATCH" in os.environ:  # else no launcher reads it: the doctor reads the output
            report_deaths(error)
        return 1
    except SignalException as error:
        log.error(f"torchrun was ended by {error.sigval.name}")
        return 1
    return 0


def report_deaths(error: ChildFailedError) -> None:
    """Leave for the launcher how workers died."""
    from llm_trainer.job.failure_reasons import report_death  # only a failure needs it

    for rank, failure in error.failures.items():
        report_death(rank, failure.exitcode, failure.timestamp + 1)  # torchrun rounds down


if __name__ == "__main__":
    log.guard_output()
    sys.exit(main())
