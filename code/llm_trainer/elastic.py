# SPDX-License-Identifier: Apache-2.0
"""torchrun, called from Python: a worker that dies ends in a sentence of ours in place of torchrun's traceback."""

import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llm_trainer.distributed import describe_rank
from llm_trainer.errors import report_failure
from llm_trainer.processes import die_with_parent


def main() -> int:
    die_with_parent()
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        from llm_trainer.failures import explain_death

        folder = Path(os.environ["LLM_TRAINER_SCRATCH"]) / "failures"
        for rank, failure in error.failures.items():
            if not (folder / f"rank-{rank}.json").exists():  # else it said itself why
                died_by = failure.timestamp + 1  # torchrun rounds down, and a rank's own words came before its death
                death = explain_death(describe_rank(rank), failure.exitcode, died_by)
                report_failure(folder, f"rank-{rank}", death)
        return 1
    except SignalException as error:
        print(f"torchrun was ended by {error.sigval.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
