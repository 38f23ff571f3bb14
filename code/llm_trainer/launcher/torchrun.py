# SPDX-License-Identifier: Apache-2.0
"""Call torchrun from Python: a worker that dies ends in a sentence of ours in place of torchrun's traceback."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llm_trainer.common import log
from llm_trainer.common.processes import die_with_parent


def main() -> int:
    """Run torchrun with this process's arguments. Return 0 or 1, and report workers that died."""
    die_with_parent()
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        from llm_trainer.job.failure_reasons import report_death

        for rank, failure in error.failures.items():
            report_death(rank, failure.exitcode, failure.timestamp + 1)  # torchrun rounds down
        return 1
    except SignalException as error:
        log.error(f"torchrun was ended by {error.sigval.name}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
