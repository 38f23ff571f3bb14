# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer watch`, `fetch`, `stop` and `list`: training jobs that were submitted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import open_client
from llm_trainer.aws.fetching import fetch_results
from llm_trainer.aws.refusals import explain_refusals
from llm_trainer.aws.watching import ENDS, describe_end, describe_job, follow_job
from llm_trainer.common import log
from llm_trainer.common.errors import UserError

NUM_LISTED = 20


def ask_aws(action: Callable[[], int]) -> int:
    """Return the exit code of an action that asks AWS, or 1 after telling what AWS refuses."""
    try:
        with explain_refusals():
            return action()
    except UserError as error:
        log.error(str(error))
        return 1


@contextmanager
def tell_stop(text: str) -> Iterator[None]:
    """Print what stays, where a stop signal such as Ctrl-C ends this process within the block."""
    try:
        yield
    except SystemExit:
        log.error(text)
        raise


def watch(name: str) -> int:
    """Show a job's log until it ends, then its result; return the exit code, 0 for a job that was completed."""

    def follow() -> int:
        job = describe_job(name)
        try:
            job = follow_job(job)
        except BaseException:  # also where AWS lets this process ask no more
            log.info(f"The job goes on. `llm-trainer stop {name}` ends it, `llm-trainer watch {name}` shows it again.")
            raise
        is_complete = job["TrainingJobStatus"] == "Completed"
        log.info(*describe_end(job), *([f"llm-trainer fetch {name}"] if is_complete else []))
        return 0 if is_complete else 1

    return ask_aws(follow)


def fetch(name: str, folder: str | None) -> int:
    """Bring a job's results to a folder, by default one of its name here, and return the exit code."""

    def bring() -> int:
        job, target = describe_job(name), Path(folder or name)
        if job["TrainingJobStatus"] not in ENDS:
            raise UserError(
                f"{name} is {job['TrainingJobStatus']}: its results come when it ends; watch it until then."
            )
        with tell_stop("Stopped: what was fetched stays, and the same command fetches the rest."):
            reports = fetch_results(job, target)
        log.info(*describe_end(job), f"Files: {target}", *(f"Report: {report}" for report in reports))
        return 0

    return ask_aws(bring)


def stop(name: str) -> int:
    """End a job in good order, and return the exit code."""

    def end() -> int:
        open_client("sagemaker").stop_training_job(TrainingJobName=name)
        log.info(f"Stopping {name}: it saves, and exports the adapter so far. `llm-trainer watch {name}` shows how.")
        return 0

    return ask_aws(end)


def list_all() -> int:
    """Print the newest training jobs, and all endpoints, which cost money; return the exit code."""

    def show() -> int:
        client = open_client("sagemaker")
        jobs = client.list_training_jobs(SortBy="CreationTime", SortOrder="Descending", MaxResults=NUM_LISTED)
        pages = client.get_paginator("list_endpoints").paginate()
        endpoints = [each for page in pages for each in page["Endpoints"]]
        log.info(*format_rows("training job", "TrainingJob", jobs["TrainingJobSummaries"]))
        log.info("", *format_rows("endpoint", "Endpoint", endpoints))
        return 0

    return ask_aws(show)


def format_rows(title: str, kind: str, found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of jobs or endpoints: name, state, and when each was created."""
    if not found:
        yield f"No {title}."
        return
    yield f"{title:64}{'state':12}created"
    for each in found:
        created = f"{each['CreationTime']:%Y-%m-%d %H:%M}"
        yield f"{each[f'{kind}Name']:64}{each[f'{kind}Status']:12}{created}"
