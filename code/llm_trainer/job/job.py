# SPDX-License-Identifier: Apache-2.0
"""A checked job, read from the SageMaker tree and the command line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.config.checks import count_devices, find_missing_hardware
from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.config.generation import GenerationSettings, find_generation_problem
from llm_trainer.config.global_batch import find_batch_problem
from llm_trainer.config.load import read_settings
from llm_trainer.config.schema import Settings
from llm_trainer.job.earlier_adapter import fetch_adapter, find_base_warnings, take_over
from llm_trainer.job.inputs import Inputs, find_inputs, list_missing_weights


@dataclass(frozen=True)
class Job:
    """A job that is known to have no mistake."""

    environment: Environment
    settings: Settings
    inputs: Inputs


def read_job(arguments: Sequence[str]) -> Job:
    """Read and check the job of the tree, as a worker needs it. Raises UserError with every mistake."""
    return check_job(read_environment(), arguments)


def check_job(environment: Environment, arguments: Sequence[str]) -> Job:
    """Read the job of this environment. Raises UserError with every mistake there is."""
    settings, problems = collect_settings(environment, arguments)
    inputs, missing = find_inputs(settings, environment, has_mistakes=bool(problems))
    missing += [*list_missing_weights(inputs), *find_missing_hardware(settings, environment)]
    num_devices = count_devices(settings.parallelism, environment)
    missing += find_batch_problem(settings.training, settings.data, num_devices)
    sections = GenerationSettings(settings.data, settings.methods, settings.training)
    missing += find_generation_problem(sections, num_devices, bool(inputs.validation))
    if problems or missing:
        raise UserError(*problems, *missing)
    return take_over_adapter(Job(environment, settings, inputs))


def fetch_earlier_adapter(job: Job, scratch_dir: Path) -> Job:
    """Return the job with what its earlier adapter tells, after downloading one that is on the Hub.

    Raises UserError where it cannot be downloaded, or something is wrong with it.
    """
    if not job.inputs.adapter:
        return job
    folder = fetch_adapter(job.inputs.adapter, job.settings.adapter.adapter_revision, scratch_dir)
    if folder != job.inputs.adapter:  # else the launcher has told so
        for text in find_base_warnings(Path(folder), job.inputs.model, job.settings.model.model_revision):
            log.warning(text)
    return take_over_adapter(job, folder)


def take_over_adapter(job: Job, folder: str | None = None) -> Job:
    """Return the job with the rank, the targets and the rest that its earlier adapter tells.

    `folder` is where the adapter was downloaded to. Without it, one that is on the Hub tells nothing yet.
    Raises UserError for what is wrong with the adapter.
    """
    place = folder or job.inputs.adapter
    if not place or not os.path.isdir(place):
        return job
    adapter = take_over(job.settings.adapter, place)
    return replace(job, settings=job.settings.model_copy(update={"adapter": adapter}))


def collect_settings(environment: Environment, arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """Return the settings as far as they are valid, and a sentence for every mistake in them and the command line."""
    try:
        given, problems = parse_arguments(arguments), []
    except UserError as error:
        given, problems = {}, list(error.problems)
    settings, others = read_settings(environment, given)
    return settings, problems + others


def parse_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Parse `--key value` and `--key=value`; a lone `--key` means true.

    Returns key -> value, with underscores in the key. Raises UserError for a word in the place of a key.
    """
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"Argument {word!r} is not of the form --key value: write --key before each value.")
        key, separator, value = word[2:].partition("=")
        if not separator:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        values[key.replace("-", "_")] = value
    return values
