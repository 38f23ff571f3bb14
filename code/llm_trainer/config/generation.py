# SPDX-License-Identifier: Apache-2.0
"""The completions that are generated at once: whole groups, one for each prompt, on all devices together."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_trainer.config.global_batch import find_global_batch
from llm_trainer.config.sections import DataSettings, MethodSettings, TrainingSettings

EVAL_ROWS = 8  # completions of a device in an evaluation, or the next number that holds whole groups


@dataclass(frozen=True)
class GenerationSettings:
    """The sections of the settings that decide how much is generated at once."""

    data: DataSettings
    methods: MethodSettings
    training: TrainingSettings


def count_generated(settings: GenerationSettings, num_devices: int) -> int:
    """Return the completions that all devices together generate at once, as TRL's configs count them."""
    methods, training = settings.methods, settings.training
    if methods.generation_batch_size is not None:
        return int(methods.generation_batch_size)
    rows = find_global_batch(training, settings.data)
    if rows is not None and methods.steps_per_generation is None:
        return rows
    steps = methods.steps_per_generation or training.gradient_accumulation_steps
    return int(training.per_device_train_batch_size * num_devices * steps)


def count_batches(settings: GenerationSettings, num_devices: int) -> float:
    """Return the batches that a device trains on from one generation to the next."""
    at_once = settings.training.per_device_train_batch_size * num_devices
    return count_generated(settings, num_devices) / at_once * count_iterations(settings)


def count_scorings(settings: GenerationSettings, num_devices: int) -> int:
    """Return how often each completion is scored before it is trained on: by its own model, and by the reference.

    RLOO always asks the model. GRPO asks it where a later step goes on with the same completions.
    """
    method, accumulated = settings.data.method, settings.training.gradient_accumulation_steps
    is_asked = method == "rloo" or accumulated % count_batches(settings, num_devices) != 0
    return is_asked + bool(settings.methods.find_value("beta", method))


def find_generation_problem(settings: GenerationSettings, num_devices: int, has_validation: bool) -> Iterator[str]:
    """Yield a sentence where what is generated at once does not hold whole groups of completions."""
    if not settings.data.generates:
        return
    group = count_group(settings)
    total = count_generated(settings, num_devices)
    if total % group:
        yield (
            f"num_generations={group} does not divide the {total} completions that are generated at once "
            f"({describe_generated(settings, num_devices)}): give num_generations={show_divisors(total, group)}, or "
            f"a batch that is a multiple of {group}."
        )
    batch = settings.training.per_device_train_batch_size * num_devices
    if settings.methods.generation_batch_size is not None and total % batch:
        yield (
            f"generation_batch_size={total} is no multiple of per_device_train_batch_size x devices = {batch}: give "
            f"{total // batch * batch + batch}, or leave it out."
        )
    if has_validation:
        yield from find_evaluation_problem(settings, num_devices)


def find_evaluation_problem(settings: GenerationSettings, num_devices: int) -> Iterator[str]:
    """Yield a sentence where a batch of an evaluation does not hold whole groups of completions."""
    group, size = count_eval_group(settings), settings.training.per_device_eval_batch_size
    if settings.training.is_given("per_device_eval_batch_size") and size * num_devices % group:
        unit = group // math.gcd(group, num_devices)
        yield (
            f"per_device_eval_batch_size={size} on {num_devices} devices does not hold whole groups of {group} "
            f"completions: give {size // unit * unit + unit}, or set num_generations_eval."
        )


def count_group(settings: GenerationSettings) -> int:
    """Return the completions of each prompt in a training."""
    return int(settings.methods.find_value("num_generations", settings.data.method))


def count_iterations(settings: GenerationSettings) -> int:
    """Return how often each completion is trained on."""
    return int(settings.methods.find_value("num_iterations", settings.data.method))


def count_eval_group(settings: GenerationSettings) -> int:
    """Return the completions of each prompt in an evaluation."""
    return int(settings.methods.num_generations_eval or count_group(settings))


def choose_eval_rows(given: Mapping[str, Any], default_group: int, num_devices: int) -> int:
    """Return the completions of a device in an evaluation where the user gives none: whole groups on all devices."""
    group = given.get("num_generations_eval") or given.get("num_generations") or default_group
    unit = group // math.gcd(group, num_devices)
    return int(-(-EVAL_ROWS // unit) * unit)


def choose_whole_groups(settings: GenerationSettings) -> dict[str, int | None]:
    """Return settings by which a single device generates whole groups, for a look at all other settings."""
    batch = settings.training.per_device_train_batch_size
    return {
        "generation_batch_size": math.lcm(batch, count_group(settings)),
        "steps_per_generation": None,
        "per_device_eval_batch_size": count_eval_group(settings),
    }


def describe_generated(settings: GenerationSettings, num_devices: int) -> str:
    """Return how many completions are generated at once, as a product or a setting."""
    methods, training = settings.methods, settings.training
    if methods.generation_batch_size is not None:
        return "generation_batch_size"
    if find_global_batch(training, settings.data) is not None and methods.steps_per_generation is None:
        return "global_batch_size"
    name = "gradient_accumulation_steps" if methods.steps_per_generation is None else "steps_per_generation"
    return describe_product(training, methods, name, num_devices)


def describe_product(training: TrainingSettings, methods: MethodSettings, name: str, num_devices: int) -> str:
    """Return the product that says how many completions are generated at once."""
    steps = methods.steps_per_generation or training.gradient_accumulation_steps
    return (
        f"per_device_train_batch_size={training.per_device_train_batch_size} x {num_devices} devices x {name}={steps}"
    )


def show_divisors(total: int, near: int) -> str:
    """Return the nearest divisors of a number below and above another one, from 2 on."""
    divisors = [number for number in range(2, total + 1) if total % number == 0]
    below = [number for number in divisors if number < near][-1:]
    above = [number for number in divisors if number > near][:1]
    return " or ".join(map(str, below + above)) or "more completions at once"
