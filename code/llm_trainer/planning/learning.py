# SPDX-License-Identifier: Apache-2.0
"""The speed that jobs have shown of instance types: actual seconds over planned ones, from their manifests."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError
from llm_trainer.journal.manifest import MANIFEST
from llm_trainer.planning.instances import InstanceType, read_instances
from llm_trainer.planning.run_time import PULL_SECONDS, RunTime

if TYPE_CHECKING:  # they import torch, which takes seconds where a plan's options are read
    from llm_trainer.model.memory.shape import ModelShape
    from llm_trainer.planning.step_time import StepTime

SAME_JOB = 0.95, 1.05  # a step beside another job's on the same instance type and model
SAME_GPU = 0.8, 1.25  # and on the same GPU with another model


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Times(BaseModel):
    """Seconds of a job in its manifest, planned or actual."""

    step_seconds: Seconds
    start_seconds: Seconds


class Compared(BaseModel):
    """A manifest's `planned_and_actual`, as far as it is learnt from."""

    instance_type: str | None
    gpu: str
    planned: Times
    actual: Times


class TaughtJob(BaseModel):
    """A manifest, as far as it is learnt from."""

    parameters: int
    trainable_parameters: int
    planned_and_actual: Compared


@dataclass(frozen=True)
class Lesson:
    """A job that has ended: its actual seconds over those that were planned."""

    instance_type: str | None
    gpu: str
    parameters: int
    trainable_parameters: int
    step_share: float
    start_share: float

    @property
    def job(self) -> tuple[str | None, int, int]:
        """The instance type and the size of the model."""
        return self.instance_type, self.parameters, self.trainable_parameters


@dataclass(frozen=True)
class Learnt:
    """Lessons of earlier jobs."""

    lessons: tuple[Lesson, ...] = ()

    def correct_step(self, step: "StepTime", host: InstanceType, shape: "ModelShape") -> "StepTime":
        """Return the time of a step as jobs of its instance type and model had it, else as jobs of its GPU had."""
        on_gpu = [lesson for lesson in self.lessons if lesson.gpu == host.gpu.name]
        model = shape.count_weights(), shape.num_trained
        same = [lesson for lesson in on_gpu if lesson.job == (host.name, *model)]
        if not on_gpu:
            return step
        share = statistics.median(lesson.step_share for lesson in same or on_gpu)
        low, high = SAME_JOB if same else SAME_GPU
        return step.scale(share, low, high)

    def correct_start(self, run: RunTime, host: InstanceType) -> RunTime:
        """Return the time of a job whose start takes as long as on its instance type before."""
        shares = [lesson.start_share for lesson in self.lessons if lesson.instance_type == host.name]
        if not shares:
            return run
        start = PULL_SECONDS + statistics.median(shares) * (run.start - PULL_SECONDS)
        return replace(run, start=start, low=run.low + start - run.start, high=run.high + start - run.start)

    def describe(self) -> Iterator[str]:
        """Yield a sentence on each GPU whose plans count what jobs on it took."""
        for gpu in self.list_gpus(are_planned=True):
            shares = [lesson.step_share for lesson in self.lessons if lesson.gpu == gpu]
            jobs = "a job" if len(shares) == 1 else f"{len(shares)} jobs"
            yield f"--learn: {jobs} on {gpu} took {statistics.median(shares):.2f} of the planned time of a step."

    def find_warnings(self) -> Iterator[str]:
        """Yield a sentence on each device of a job that no instance type has."""
        for gpu in self.list_gpus(are_planned=False):
            yield f"--learn: a job ran on {gpu}, which no planned instance type has: its times do not count here."

    def list_gpus(self, are_planned: bool) -> list[str]:
        """List the devices of jobs that instance types have, or those that none has."""
        planned = {host.gpu.name for host in read_instances().types.values()}
        return sorted({lesson.gpu for lesson in self.lessons if (lesson.gpu in planned) == are_planned})


def learn(files: Iterable[str]) -> Learnt:
    """Return the lessons of these manifests, or of those in these folders. Raise UserError where one has none."""
    lessons, problems = [], []
    for file in files:
        lesson = read_lesson(Path(file))
        if isinstance(lesson, str):
            problems.append(f"--learn {file}: {lesson}")
        else:
            lessons.append(lesson)
    if problems:
        raise UserError(*problems)
    return Learnt(tuple(lessons))


def read_lesson(place: Path) -> Lesson | str:
    """Return what a job's manifest teaches, or a sentence on why it teaches nothing. A folder stands for its own."""
    file = place / MANIFEST if place.is_dir() else place
    try:
        return find_lesson(read_json(file))
    except UnreadableTextError as error:
        return f"it {error.reason}: give {MANIFEST} of a job that has ended."


def find_lesson(manifest: Any) -> Lesson | str:
    """Return what the content of a manifest teaches, or a sentence on why it teaches nothing."""
    try:
        job = TaughtJob.model_validate(manifest)
    except ValidationError:
        return f"it tells no time of a step: give {MANIFEST} of a job that took at least two steps."
    planned, actual = job.planned_and_actual.planned, job.planned_and_actual.actual
    return Lesson(
        job.planned_and_actual.instance_type,
        job.planned_and_actual.gpu,
        job.parameters,
        job.trainable_parameters,
        actual.step_seconds / planned.step_seconds,
        actual.start_seconds / planned.start_seconds,
    )
