# SPDX-License-Identifier: Apache-2.0
"""The process that is started once a device: runs the training, and tells the launcher why when it fails."""

import gc
import os
import re
import sys
from pathlib import Path

from llm_trainer.common.errors import UserError, report_failure, reserve_failure
from llm_trainer.common.library_noise import silence_libraries
from llm_trainer.common.processes import die_with_parent, exit_without_teardown
from llm_trainer.common.ranks import describe_rank, local_rank, rank
from llm_trainer.config.tracker_choice import configure_trackers
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.failure_reasons import explain, write_traceback
from llm_trainer.job.job import Job, read_job
from llm_trainer.journal.journal import FILE_NAME, Journal
from llm_trainer.journal.timeline import Timeline
from llm_trainer.training.lost_batches import end_process_on_lost_batch


def main() -> int:
    """The worker's exit code."""
    die_with_parent()
    end_process_on_lost_batch()
    scratch_dir = Path(os.environ["LLM_TRAINER_SCRATCH"])
    silence_libraries()
    job = read_job(sys.argv[1:])
    environment = job.environment
    journal = Journal(environment.output_dir / "data" / FILE_NAME if rank() == 0 else None)
    timeline = Timeline.continue_from_launcher(journal, environment.current_host)
    try:
        reserve_failure(scratch_dir / "failures", f"rank-{rank()}")
        configure_trackers(job.settings.tracking, job.settings.output)
        if not may_need_bitsandbytes(job):
            sys.modules["bitsandbytes"] = None  # type: ignore[assignment] # PEFT would import it, for seconds
        timeline.mark("launch")
        gc.disable()  # what imports make stays: to search it for garbage would take a sixth of their time
        from llm_trainer.train import train  # torch and the rest, after the trackers are configured

        gc.freeze()  # nor is it searched later
        gc.enable()
        timeline.mark("imports")
        train(job, scratch_dir, journal, timeline)
    except Exception as error:  # the last frame of the process: whatever it was, SageMaker must learn of it
        tell(error, job, scratch_dir)
        return 1
    return 0


def may_need_bitsandbytes(job: Job) -> bool:
    """Whether the job quantizes, has an optimizer of that package, or a model that may be quantized already."""
    config = Path(job.inputs.model) / "config.json"
    return (
        job.settings.model.load_in_4bit
        or job.settings.model.load_in_8bit
        or re.search("bnb|bit|paged|lion|ademamix", job.settings.training.optim) is not None
        or not config.is_file()
        or "quantization_config" in config.read_text(encoding="utf-8")
    )


def tell(error: Exception, job: Job, scratch_dir: Path) -> None:
    """Leave the reason for the launcher, and the traceback, unless it is a user's mistake, in the log and a file."""
    environment, inputs = job.environment, job.inputs
    folders = {
        "_save_checkpoint": inputs.checkpoint_dir,
        "export": inputs.model_dir,
        "fetch_model": Path(os.environ["HF_HOME"]),
        "write_source": Path(os.environ["LLM_TRAINER_CACHE"]).parent,
    }
    failure = explain(error, describe_rank(rank()), job.settings, folders)
    if local_rank() == 0:
        checkpoint_dir.remove_partial_checkpoints(
            inputs.checkpoint_dir
        )  # half a checkpoint may be what filled the disk
    report_failure(scratch_dir / "failures", f"rank-{rank()}", failure)
    if not isinstance(error, UserError):
        name = f"{environment.current_host}-rank-{rank()}.txt"
        text = write_traceback(error, environment.output_dir / "data" / "failures" / name, job.settings)
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_without_teardown(main())
