# SPDX-License-Identifier: Apache-2.0
"""The process that is started once a device. It trains, and tells the launcher why when it fails."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, report_failure, reserve_failure
from llm_trainer.common.library_noise import silence_libraries
from llm_trainer.common.processes import end_children_by_kill, exit_without_teardown
from llm_trainer.common.ranks import POLL_SECONDS, describe_rank, local_rank, local_world_size, rank, world_size
from llm_trainer.config.tracker_choice import configure_trackers
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.failure_reasons import JobFacts, explain, is_absence, write_traceback
from llm_trainer.job.job import Job, read_job
from llm_trainer.job.rank_traces import REPORT_SECONDS, describe_meeting, find_trace_prefix, write_trace
from llm_trainer.journal.journal import FILE_NAME, Journal
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.quick_imports import import_quickly, leave_out_bitsandbytes
from llm_trainer.training.lost_batches import end_process_on_lost_batch


def main() -> int:
    """Run the job of this worker. Return the process's exit code."""
    end_children_by_kill()
    end_process_on_lost_batch()
    scratch_dir = Path(os.environ["LLM_TRAINER_SCRATCH"])
    log.escape_unprintable()
    silence_libraries()
    job = read_own_job(scratch_dir / "failures")
    environment = job.environment
    journal = Journal(environment.output_dir / "data" / FILE_NAME if rank() == 0 else None)
    timeline = Timeline.continue_from_launcher(journal, environment.current_host)
    try:
        configure_trackers(job.settings.tracking, job.settings.output)
        timeline.mark("launch")
        sections, inputs = (job.settings.model, job.settings.methods), job.inputs
        with leave_out_bitsandbytes(sections, job.settings.training.optim, inputs.model, inputs.teacher):
            train = import_train(job)
            timeline.mark("imports")
            train(job, scratch_dir, timeline)
    except (Exception, SystemExit) as error:  # the last frame: whatever it was, even a library's exit, is told of
        report_worker_failure(error, job, scratch_dir)
        return 1
    return 0


def import_train(job: Job) -> Callable[[Job, Path, Timeline], None]:
    """Return what trains a job. Torch and the rest take seconds to import, and mistakes were told before."""
    with import_quickly(job.settings.model):
        from llm_trainer.train import train
    return train


def read_own_job(failures_dir: Path) -> Job:
    """Return the job of this worker. An error, which the launcher did not meet, is raised and left for it."""
    reserve_failure(failures_dir, f"rank-{rank()}")
    try:
        return read_job(json.loads(os.environ["LLM_TRAINER_ARGUMENTS"]))
    except Exception as error:
        report_failure(failures_dir, f"rank-{rank()}", explain(error, describe_rank(rank()), None))
        raise


def report_worker_failure(error: BaseException, job: Job, scratch_dir: Path) -> None:
    """Leave the reason for the launcher, and the traceback, unless it is a user's mistake, in the log and a file."""
    environment, facts = job.environment, collect_facts(job)
    failure = explain(error, describe_rank(rank()), facts)
    if is_absence(error):
        waits = (describe_meeting(rank(), world_size(), job.settings.parallelism.ddp_timeout),)
        failure = replace(failure, waits=waits)
    if local_rank() == 0:  # half a checkpoint may be what filled the disk
        checkpoint_dir.remove_partial_checkpoints(job.inputs.checkpoint_dir)
    report_failure(scratch_dir / "failures", f"rank-{rank()}", failure)
    if failure.kind == "peer":
        leave_gloo_trace(error)
        wait_for_local_reports(scratch_dir / "failures")
    if not isinstance(error, UserError):
        name = f"{environment.current_host}-rank-{rank()}.txt"
        log.error(write_traceback(error, environment.output_dir / "data" / "failures" / name))


def leave_gloo_trace(error: BaseException) -> None:
    """Write which collectives of gloo this rank took part in, where the error is gloo's. NCCL writes its own."""
    from torch import distributed
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined] # not in torch's stubs

    prefix = find_trace_prefix(os.environ)
    if not prefix or not distributed.is_initialized() or isinstance(error, distributed.DistError):
        return
    try:
        write_trace(prefix, rank(), _dump_fr_trace_json(includeCollectives=True, onlyActive=False))
    except OSError as error:
        log.warning(f"The collectives of rank {rank()} could not be written: {error}")


def wait_for_local_reports(failures_dir: Path) -> None:
    """Wait until all ranks of this host have told why they fail, for some seconds at most.

    At the end of the first one torchrun ends the others, and one that hangs could not be told from them.
    """
    deadline = time.monotonic() + REPORT_SECONDS
    while len(list(failures_dir.glob("rank-*.json"))) < local_world_size() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def collect_facts(job: Job) -> JobFacts:
    """Return what a sentence about a failure of the job may name."""
    settings, inputs = job.settings, job.inputs
    caches = Path(os.environ["HF_HOME"]), Path(os.environ["LLM_TRAINER_CACHE"]).parent
    return JobFacts(
        model=settings.model,
        adapter=settings.adapter,
        data=settings.data,
        training=settings.training,
        parallelism=settings.parallelism,
        folders=(inputs.checkpoint_dir, inputs.model_dir, *caches),
    )


if __name__ == "__main__":
    log.guard_output()
    exit_without_teardown(main())
