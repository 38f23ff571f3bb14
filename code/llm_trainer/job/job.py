# SPDX-License-Identifier: Apache-2.0
"""A checked job, read from the SageMaker tree and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_trainer.common.errors import UserError
from llm_trainer.config.checks import find_missing_hardware
from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.config.load import read_settings
from llm_trainer.config.schema import Settings
from llm_trainer.job.inputs import Inputs, find_inputs, find_missing_weights


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
    missing += [*find_missing_weights(inputs.model), *find_missing_hardware(settings, environment)]
    if problems or missing:
        raise UserError(*problems, *missing)
    return Job(environment, settings, inputs)


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
