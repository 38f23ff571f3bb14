# SPDX-License-Identifier: Apache-2.0
"""The job's run in Weights & Biases.

Its own files are in output/data/wandb. With WANDB_MODE=offline they are all there is.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from pydantic import ValidationError
from wandb.errors import AuthenticationError, UsageError

from llm_trainer.common.errors import quote_error
from llm_trainer.common.log import show_line
from llm_trainer.journal.manifest import list_whole_result
from llm_trainer.journal.records import EndStatus, JobRecord, Record
from llm_trainer.trackers.events import (
    ANSWER_TABLE,
    Answer,
    build_columns,
    choose_run_name,
    find_data_sets,
    find_parameters,
    find_surroundings,
    read_rows,
    renew_answers,
)
from llm_trainer.trackers.feed import TrackerUsageError
from llm_trainer.trackers.run_identity import RunIdentity, recall_run, remember_run

INIT_SECONDS = 15
TAG_CHARACTERS = 64
SYSTEM_METRICS = ("gpu/*", "host/*")
IMAGES_BESIDE = "sample_images"  # of an offline run


class WandbTracker:
    """The job's run in Weights & Biases."""

    name = "W&B"

    def __init__(self, identity_dir: Path | None, data_dir: Path) -> None:
        """Keep the run's identity in `identity_dir`, if given, and W&B's files in `data_dir`."""
        self.identity_dir, self.data_dir = identity_dir, data_dir
        self.answers: list[Answer] = []  # that are not in a table yet

    def begin(self, job: JobRecord) -> str:
        """Make the job's run or continue it. Return where it is."""
        identity = recall_run(self.identity_dir, "wandb") or RunIdentity(choose_run_id(job), job["time"])
        self.started = identity.started
        is_offline = os.environ.get("WANDB_MODE") == "offline"
        check_variables()
        try:
            self.run = self.init_run(job, os.environ.get("WANDB_RUN_ID") or identity.run_id, is_offline)
        except (UsageError, AuthenticationError) as error:
            raise TrackerUsageError(quote_error(error)) from error
        remember_run(self.identity_dir, "wandb", RunIdentity(self.run.id, identity.started))
        # Steps of our own: W&B's may only grow, and a resumed job repeats some.
        self.run.define_metric("*", step_metric="step")
        for pattern in SYSTEM_METRICS:
            self.run.define_metric(pattern, step_metric="seconds")
        where = f"in {self.run.dir}, to be sent with `wandb sync`" if is_offline else f"at {self.run.url}"
        return f"run {self.run.name!r} ({self.run.id}) {where}"

    def init_run(self, job: JobRecord, run_id: str, is_offline: bool) -> wandb.Run:
        """Return the run of this id, new or continued. Raises what W&B does."""
        name = job.get("name")
        return wandb.init(
            id=run_id,
            project=os.environ.get("WANDB_PROJECT"),
            entity=os.environ.get("WANDB_ENTITY"),
            name=choose_run_name(job, os.environ.get("WANDB_NAME")),
            tags=[show_line(name)[:TAG_CHARACTERS]] if name else None,
            resume=None if is_offline else "allow",
            dir=os.environ.get("WANDB_DIR", str(self.data_dir)),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_SECONDS,
                x_disable_stats=True,  # the journal has the GPUs of all hosts
                x_disable_meta=True,
            ),
        )

    def send(self, records: Sequence[Record]) -> None:
        """Send the settings, data sets and numbers in the records."""
        config: dict[str, Any] = {**find_parameters(records), **find_surroundings(records)}
        for data in find_data_sets(records):
            config[f"data/{data.split}"] = {"digest": data.digest, **data.source, **data.sizes}
        if config:
            self.run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]
        for row in read_rows(records, self.started):
            self.run.log({**row.values, row.axis: row.step, "_timestamp": row.time})
        self.answers = renew_answers(self.answers, records)

    def upload(self, files: list[Path]) -> None:
        """Copy files into the run's folder, and save them with the run. Answers to sample prompts become a table."""
        for file in files:
            copy = shutil.copy(file, self.run.dir)
            self.run.save(copy, base_path=self.run.dir, policy="now")
        if self.answers:
            self.run.log(build_media(self.answers, self.run.offline))
            self.answers = []

    def upload_model(self, folder: Path) -> None:
        """Log the result in the model's folder as an artifact."""
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model")
        for name in list_whole_result(folder):
            artifact.add_file(str(folder / name), name, policy="immutable")
        self.run.log_artifact(artifact)

    def end(self, status: EndStatus, reason: str | None) -> None:
        """End the run, and W&B's own process."""
        self.run.summary["status"] = status
        if reason:
            self.run.summary["failure_reason"] = reason
        self.run.finish(exit_code=1 if status == "failed" else 0)
        wandb.teardown()


def build_media(answers: list[Answer], is_offline: bool) -> dict[str, Any]:
    """Return a table of answers, with the images of their prompts.

    W&B keeps the images of a table outside of the run's folder, and an offline run leaves that folder alone. So they
    come beside the table then.
    """
    columns, beside = build_columns(answers), {}
    if "images" in columns:
        columns["images"] = [
            wandb.Image(image, caption=prompt)
            for image, prompt in zip(columns["images"], columns["prompt"], strict=True)
        ]
        if is_offline:
            beside = {IMAGES_BESIDE: columns.pop("images")}
    table = wandb.Table(columns=list(columns), data=[list(row) for row in zip(*columns.values(), strict=True)])
    return {ANSWER_TABLE: table, **beside}


def check_variables() -> None:
    """Raise TrackerUsageError where W&B refuses one of its variables.

    W&B itself raises once, and keeps those that it had read by then: its next attempt would go to a project named
    uncategorized.
    """
    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except UsageError as error:
        raise TrackerUsageError(quote_error(error)) from error
    except ValidationError as error:
        texts = (f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_input=False))
        raise TrackerUsageError("; ".join(texts)) from error


def choose_run_id(job: JobRecord) -> str:
    """Return an id that is the same at every start of a training job, whose ARN SageMaker gives but once."""
    if arn := job.get("arn"):
        return hashlib.sha256(arn.encode()).hexdigest()[:16]
    return uuid.uuid4().hex[:16]
