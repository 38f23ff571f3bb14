# SPDX-License-Identifier: Apache-2.0
"""The process that torchrun starts once a device: runs the training, and tells SageMaker why when it fails."""

import os
import sys
import traceback
import warnings
from pathlib import Path

from llm_trainer.distributed import leave_world_of_one, rank
from llm_trainer.environment import find_base_dir
from llm_trainer.errors import UserError, write_failure
from llm_trainer.launch import read_job
from llm_trainer.timeline import Timeline
from llm_trainer.tracking import configure_trackers


def main() -> int:
    """The worker's exit code."""
    output_dir = find_base_dir() / "output"
    timeline = Timeline(started=float(os.environ["LLM_TRAINER_STARTED"]))
    leave_world_of_one()
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' words to each other, not to the user
    try:
        job = read_job(sys.argv[1:])
        configure_trackers(job.settings)
        timeline.mark("launch")
        from llm_trainer.train import train  # torch and the rest, after the trackers are configured

        timeline.mark("imports")
        train(job, Path(os.environ["LLM_TRAINER_SCRATCH"]), timeline)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        write_failure(output_dir, str(error))
        return 1
    except Exception as error:  # the last frame of the process: whatever it was, SageMaker must learn of it
        traceback.print_exc()
        write_failure(output_dir, f"Rank {rank()} failed with {type(error).__name__}: {error} (traceback in the log)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
