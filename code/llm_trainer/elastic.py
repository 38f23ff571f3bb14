# SPDX-License-Identifier: Apache-2.0
"""torchrun, called from Python: a worker that dies ends in one sentence of ours in place of torchrun's traceback."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from llm_trainer.environment import find_base_dir
from llm_trainer.errors import write_failure


def main() -> int:
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        write_failure(find_base_dir() / "output", describe_death(rank, failure))  # a worker's own reason came first
        return 1
    except SignalException as error:
        write_failure(
            find_base_dir() / "output", f"Training was stopped by {error.sigval.name} before it was finished."
        )
        return 1
    return 0


def describe_death(rank: int, failure: ProcessFailure) -> str:
    if failure.exitcode == -9:
        return (
            f"Rank {rank} was killed by signal 9, most likely because the host ran out of memory: "
            "use an instance with more memory, or fewer worker processes (nproc_per_node)."
        )
    if failure.exitcode < 0:
        return f"Rank {rank} was killed by {failure.signal_name()}: the log above holds its last lines."
    return f"Rank {rank} ended with exit code {failure.exitcode}: the log above holds its error."


if __name__ == "__main__":
    sys.exit(main())
