# SPDX-License-Identifier: Apache-2.0
"""The job's run in MLflow: on a server, in a database or folder, or in SageMaker by the plugin sagemaker-mlflow."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from llm_trainer.common.log import show_line
from llm_trainer.config.tracker_choice import SQLITE
from llm_trainer.journal.manifest import list_whole_result
from llm_trainer.journal.records import EndStatus, JobRecord, Record
from llm_trainer.trackers.events import (
    ANSWER_TABLE,
    Answer,
    DataSet,
    build_columns,
    choose_run_name,
    find_data_sets,
    find_parameters,
    find_surroundings,
    read_rows,
    renew_answers,
)
from llm_trainer.trackers.feed import TrackerUsageError
from llm_trainer.trackers.run_identity import MODEL_PATH, RunIdentity, leave_run, log_files, recall_run, remember_run

Item = TypeVar("Item")

# MLflow's limits (mlflow/utils/validation.py): entities a request, and characters.
METRICS_A_REQUEST = 1000
TEXTS_A_REQUEST = 100
PARAMETER_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DIGEST_CHARACTERS = 36
FORBIDDEN = re.compile(r"[^/\w.\- :]")  # in the name of a metric or parameter
STATUS: dict[EndStatus, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
CONTEXT = {"train": "training"}  # MLflow's word for a split; the others keep their name
FAILURE_TAG = "failure_reason"
ARN_TAG, NAME_TAG = "training_job_arn", "training_job_name"


class MlflowTracker:
    """The job's run in MLflow."""

    name = "MLflow"

    def __init__(self, identity_dir: Path | None, scratch_dir: Path) -> None:
        """Keep the run's identity in `identity_dir`, if given, and leave it in `scratch_dir` for the workers."""
        self.identity_dir, self.scratch_dir = identity_dir, scratch_dir
        self.answers: list[Answer] = []  # that are not in a table yet

    def begin(self, job: JobRecord) -> str:
        """Make the job's run or continue it. Return where it is."""
        uri = os.environ["MLFLOW_TRACKING_URI"]
        if uri.startswith(SQLITE):  # MLflow puts the artefacts of such a run into the working directory
            folder = Path(uri.removeprefix(SQLITE)).parent
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
        self.client = MlflowClient(uri)
        experiment = self.find_experiment()
        run = self.find_run(job, experiment) or self.create_run(job, experiment)
        self.run_id, self.parameters = run.info.run_id, dict(run.data.params)
        self.started = run.info.start_time / 1000
        if FAILURE_TAG in run.data.tags:
            self.client.delete_tag(self.run_id, FAILURE_TAG)
        remember_run(self.identity_dir, "mlflow", RunIdentity(self.run_id, self.started))
        leave_run(self.scratch_dir, self.run_id)
        return f"run {run.info.run_name!r} ({self.run_id}) of experiment {run.info.experiment_id} at {uri}"

    def find_experiment(self) -> str:
        """Return the experiment's id. The experiment is made where there is none of its name."""
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            with explain_absence(f"MLFLOW_EXPERIMENT_ID={given!r} is no experiment of this server"):
                check_active(self.client.get_experiment(given), given)
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = self.client.get_experiment_by_name(name)
        if found:
            check_active(found, name)
        return str(found.experiment_id if found else self.client.create_experiment(name))

    def find_run(self, job: JobRecord, experiment: str) -> Run | None:
        """Return the run that this job was given, or that it began before it was interrupted. Have it run again."""
        known = recall_run(self.identity_dir, "mlflow")
        if given := os.environ.get("MLFLOW_RUN_ID"):
            with explain_absence(f"MLFLOW_RUN_ID={given!r} is no run of this server"):
                run: Run | None = self.read_given_run(given)
        else:
            run = (self.read_run(known.run_id) if known else None) or self.search_run(job, experiment)
        if run is not None:
            self.client.update_run(run.info.run_id, status="RUNNING")
        return run

    def read_given_run(self, run_id: str) -> Run:
        """Return the run that the user names. Raises TrackerUsageError where it has been deleted: it takes nothing."""
        run: Run = self.client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            raise TrackerUsageError(
                f"the run MLFLOW_RUN_ID={run_id!r} has been deleted: restore it (`mlflow runs restore --run-id "
                f"{run_id}`), or leave MLFLOW_RUN_ID out"
            )
        return run

    def read_run(self, run_id: str) -> Run | None:
        """Return a run by its id, or None where this server does not have it or it has been deleted."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def search_run(self, job: JobRecord, experiment: str) -> Run | None:
        """Return the training job's run, found by the ARN, which SageMaker gives but once."""
        if not job.get("arn"):
            return None
        found = self.client.search_runs([experiment], f"tags.{ARN_TAG} = '{job['arn']}'", max_results=1)
        return found[0] if found else None

    def create_run(self, job: JobRecord, experiment: str) -> Run:
        """Create a run with the tags by which people and `search_run` find it."""
        tags = {"mlflow.source.name": "sagemaker-llm-trainer", "mlflow.source.type": "JOB"}
        if revision := job["environment"].get("revision"):
            tags["mlflow.source.git.commit"] = revision
        named = {ARN_TAG: job.get("arn"), NAME_TAG: job.get("name")}
        tags |= {tag: show_line(value) for tag, value in named.items() if value}
        name = choose_run_name(job, os.environ.get("MLFLOW_RUN_NAME"))
        return self.client.create_run(experiment, start_time=round(job["time"] * 1000), tags=tags, run_name=name)

    def send(self, records: Sequence[Record]) -> None:
        """Send the settings, data sets and numbers in the records."""
        self.send_texts(records)
        inputs = [describe_data_set(data) for data in find_data_sets(records)]
        if inputs:
            self.client.log_inputs(self.run_id, inputs)
        metrics = [
            Metric(FORBIDDEN.sub("_", name), value, round(row.time * 1000), row.step)
            for row in read_rows(records, self.started)
            for name, value in row.values.items()
        ]
        for batch in split_batches(metrics, METRICS_A_REQUEST):
            self.client.log_batch(self.run_id, metrics=batch, synchronous=True)
        self.answers = renew_answers(self.answers, records)  # last: what fails before it is sent again

    def send_texts(self, records: Sequence[Record]) -> None:
        """Send parameters and tags. MLflow never changes a parameter, so a resumed job's new value becomes a tag."""
        asked = {
            FORBIDDEN.sub("_", name): value[:PARAMETER_CHARACTERS] for name, value in find_parameters(records).items()
        }
        new = {name: value for name, value in asked.items() if name not in self.parameters}
        for params in split_batches([Param(name, value) for name, value in new.items()], TEXTS_A_REQUEST):
            self.client.log_batch(self.run_id, params=params, synchronous=True)
        self.parameters |= new
        tags = {f"resumed.{name}": value for name, value in asked.items() if self.parameters[name] != value}
        tags |= find_surroundings(records)
        cut = [RunTag(name, value[:TAG_CHARACTERS]) for name, value in tags.items()]
        for some in split_batches(cut, TEXTS_A_REQUEST):
            self.client.log_batch(self.run_id, tags=some, synchronous=True)

    def upload(self, files: list[Path]) -> None:
        """Log files as artifacts of the run, and the answers to sample prompts as a table."""
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        if self.answers:
            self.client.log_table(self.run_id, build_columns(self.answers), f"{ANSWER_TABLE}.json")
            self.answers = []  # a second attempt would append them to the table

    def upload_model(self, folder: Path) -> None:
        """Log the result in the model's folder, unless the worker that registers the model has logged it."""
        if not any(
            file.path == f"{MODEL_PATH}/MLmodel" for file in self.client.list_artifacts(self.run_id, MODEL_PATH)
        ):
            # It is not registered from there.
            log_files(self.client, self.run_id, folder, list_whole_result(folder), MODEL_PATH)

    def end(self, status: EndStatus, reason: str | None) -> None:
        """End the run with the job's status, and with the reason as a tag."""
        if reason:
            self.client.set_tag(self.run_id, FAILURE_TAG, reason[:TAG_CHARACTERS])
        self.client.set_terminated(self.run_id, STATUS[status])


@contextlib.contextmanager
def explain_absence(what: str) -> Iterator[None]:
    """Raise TrackerUsageError with `what` where the block asks for something that the server does not have."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackerUsageError(f"{what}: correct it, or leave it out") from error


def check_active(experiment: Experiment, given: str) -> None:
    """Raise TrackerUsageError for an experiment that has been deleted: it takes no runs until it is restored."""
    if experiment.lifecycle_stage != "active":
        number = experiment.experiment_id
        raise TrackerUsageError(
            f"the experiment {given!r} has been deleted: restore it (`mlflow experiments restore -x {number}`), or set "
            "another mlflow_experiment_name"
        )


def describe_data_set(data: DataSet) -> DatasetInput:
    """Return a split as the input of a run."""
    first = data.source["files"][0].get("uri") if data.source["files"] else None
    data_set = Dataset(
        name=data.split,
        digest=data.digest[:DIGEST_CHARACTERS],
        source_type=str(first).partition("://")[0] if first else "local",
        source=json.dumps(data.source, default=str),
        profile=json.dumps(data.sizes),
    )
    return DatasetInput(data_set, [InputTag("mlflow.data.context", CONTEXT.get(data.split, data.split))])


def split_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of at most `size` items."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch
