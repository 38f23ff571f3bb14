# SPDX-License-Identifier: Apache-2.0
"""Call torchrun from Python: a worker that dies ends in a sentence of ours in place of torchrun's traceback.

    python -m llm_trainer.launcher.torchrun OPTIONS -- COMMAND

The command starts a worker, which dies with torchrun.
"""

import os
import signal
import sys
import time
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llm_trainer.common import log
from llm_trainer.common.errors import Failure, report_failure
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
    except DistError as error:
        report_separation(error)
        return 1
    except SignalException as error:
        log.error(f"torchrun was ended by {error.sigval.name}")
        return 1
    return 0


def report_separation(error: DistError) -> None:
    """Leave for the launcher that the torchruns of the hosts do not reach each other, as by a firewall."""
    from llm_trainer.launcher.worker_processes import MASTER_PORT  # only a failure needs it

    log.error(str(error).splitlines()[0])  # the rest are frames of C++
    if "LLM_TRAINER_SCRATCH" in os.environ:
        reason = (
            f"The hosts do not reach each other on port {MASTER_PORT} of the first one, or lost it: let them reach "
            "each other on every port (the job's security groups)."
        )
        folder = Path(os.environ["LLM_TRAINER_SCRATCH"]) / "failures"
        report_failure(folder, "torchrun", Failure(reason, "peer", time.time()))


def report_deaths(error: ChildFailedError) -> None:
    """Leave for the launcher how workers died."""
    from llm_trainer.job.failure_reasons import report_death  # only a failure needs it

    for rank, failure in error.failures.items():
        report_death(rank, failure.exitcode, failure.timestamp + 1)  # torchrun rounds down


if __name__ == "__main__":
    log.guard_output()
    sys.exit(main())
