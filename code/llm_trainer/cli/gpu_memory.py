# SPDX-License-Identifier: Apache-2.0
"""Rows that a device takes at once, and the memory that they need on a GPU, for `validate` and `plan`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_trainer.cli.validation import Validation
from llm_trainer.common.errors import UserError
from llm_trainer.common.units import show_bytes
from llm_trainer.config.checks import count_devices, count_usable_hosts
from llm_trainer.config.environment import Environment
from llm_trainer.config.generation import GenerationSettings, find_generation_problem
from llm_trainer.config.global_batch import (
    PIECES,
    describe_batch,
    find_batch_problem,
    find_global_batch,
    list_device_batches,
)
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import DataSettings, TrainingSettings
from llm_trainer.host.nvidia_driver import read_driver
from llm_trainer.readers.sources import find_validation_sources

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llm_trainer.data.images.row_images import RowImages
    from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target
    from llm_trainer.model.teacher.teacher import Teacher


def examine_batch(settings: Settings, environment: Environment, validation: Validation, runs_here: bool = True) -> None:
    """Add what keeps the job's devices from sharing its global batch.

    The devices are known where they are here, unless the job runs elsewhere, or the settings tell them.
    """
    parallelism = settings.parallelism
    is_here = runs_here and environment.num_gpus > 0
    is_known = is_here or parallelism.use_cpu or parallelism.is_given("nproc_per_node")
    num_devices = count_devices(parallelism, environment)
    problems = [*find_batch_problem(settings.training, settings.data, num_devices)]
    sections = GenerationSettings(settings.data, settings.methods, settings.training)
    has_validation = bool(find_validation_sources(settings.data, environment)[0])
    problems += find_generation_problem(sections, num_devices, has_validation)
    validation.add_findings("batch", "error" if is_known else "warning", problems)


@dataclass(frozen=True, eq=False)
class Models:
    """The models that a job's memory has to hold, and the images that they see."""

    config: "PreTrainedConfig"  # of the one that is trained
    teacher: "Teacher | None" = None  # of a distillation
    images: "RowImages | None" = None  # of the row with the most, where rows have some


def examine_memory(
    models: Models, settings: Settings, environment: Environment, longest_row: int, validation: Validation
) -> "MemoryScenario | None":
    """Add what the job needs of the GPUs that are here, or of whichever GPUs it will run on.

    `longest_row` is the length of the longest row in tokens. Return what was looked at, None where it is not known.
    """
    from llm_trainer.model.memory.shape import UnknownShapeError

    num_devices = count_devices(settings.parallelism, environment)
    try:
        target = find_gpus(settings, environment)
        evaluates = bool(find_validation_sources(settings.data, environment)[0])
        if target is None:
            scenario = build_elsewhere(models, settings, longest_row, evaluates)
            fit_elsewhere(scenario, list_splits(settings, num_devices), validation)
            return scenario
        if any(find_batch_problem(settings.training, settings.data, num_devices)):
            return None  # told already
        scenario = build_scenario(models, settings, longest_row, target, evaluates)
        fit_here(scenario, validation)
        fit_fewer_hosts(scenario, count_usable_hosts(settings, environment), validation)
        return scenario
    except UserError as error:
        validation.add_findings("memory", "error", error.problems)
    except UnknownShapeError as error:
        text = f"What memory the model needs is not known, since {error}."
        validation.add_findings("memory", "warning", [text])
        return scenario
    return None


def find_gpus(settings: Settings, environment: Environment) -> "Target | None":
    """Return the GPUs that a job would train on, or None where there are none or it would not use them."""
    from llm_trainer.model.device import find_device
    from llm_trainer.model.memory.scenario import Target

    on_gpu = environment.num_gpus > 0 and not settings.parallelism.use_cpu
    driver = read_driver() if on_gpu else None
    if driver is None:
        return None
    num_devices = count_devices(settings.parallelism, environment)
    return Target(find_device(settings.parallelism.use_cpu), num_devices, min(gpu.memory_bytes for gpu in driver.gpus))


def build_scenario(
    models: Models, settings: Settings, longest_row: int, target: "Target", evaluates: bool
) -> "MemoryScenario":
    """Return the job on these GPUs, with the kernels that the image has for them."""
    from llm_trainer.model.memory.fit import choose_kernels
    from llm_trainer.model.memory.scenario import MemoryScenario

    sections = collect_sections(settings)
    scenario = MemoryScenario(models.config, sections, longest_row, target, evaluates=evaluates)
    return choose_kernels(replace(scenario, teacher=models.teacher, images=models.images))


def fit_here(scenario: "MemoryScenario", validation: Validation) -> None:
    """Add how the job would fit on these GPUs."""
    from llm_trainer.model.memory.fit import choose_memory_plan
    from llm_trainer.model.memory.global_batch import split_global_batch

    scenario = split_global_batch(scenario)
    add_batch(scenario.settings.training, scenario.settings.data, validation)
    plan = choose_memory_plan(scenario)
    validation.memory = plan.describe()
    validation.add_findings("memory", "warning" if plan.warning else "ok", [plan.warning or plan.reason])


def build_elsewhere(models: Models, settings: Settings, longest_row: int, evaluates: bool) -> "MemoryScenario":
    """Return the job on one current GPU, which need not be here."""
    from llm_trainer.model.memory.fit import move_elsewhere

    scenario = move_elsewhere(models.config, collect_sections(settings), longest_row, evaluates)
    return replace(scenario, teacher=models.teacher, images=models.images)


def fit_fewer_hosts(scenario: "MemoryScenario", counts: list[int], validation: Validation) -> None:
    """Add what the job lacks on the fewest hosts that it may go on with. `counts` are those numbers, the most first."""
    from llm_trainer.model.memory.global_batch import describe_fewer_hosts

    if shortage := describe_fewer_hosts(scenario, counts):
        validation.add_findings("memory", "warning", [shortage])


def list_splits(settings: Settings, num_devices: int) -> Iterator[Settings]:
    """Yield the job with the fewest rows that its global batch lets a device take at once, and with the most.

    Which of them a GPU will take depends on its memory. A job without a global batch is yielded as it is.
    """
    training = settings.training
    rows = find_global_batch(training, settings.data)
    pieces = math.prod(training.value(name) for name in PIECES)
    if rows is None or (all(training.is_given(name) for name in PIECES) and rows % pieces == 0):
        yield settings
    elif not any(find_batch_problem(training, settings.data, num_devices)):  # told already
        sizes = list_device_batches(rows, num_devices, training)
        for size in sorted({sizes[-1], sizes[0]}):
            split = dict(zip(PIECES, (size, rows // (num_devices * size)), strict=True))
            yield settings.model_copy(update={"training": training.fill_in(**split)})


def fit_elsewhere(scenario: "MemoryScenario", splits: Iterator[Settings], validation: Validation) -> None:
    """Add what the job needs in each split of its batch. Raise UnknownShapeError."""
    for split in splits:
        fit_split(replace(scenario, settings=collect_sections(split), known_shape=scenario.shape), validation)


def fit_split(scenario: "MemoryScenario", validation: Validation) -> None:
    """Add the global batch, what each way of training needs, and the smallest GPU that holds it."""
    from llm_trainer.model.memory.fit import estimate_ways
    from llm_trainer.model.memory.remedies import find_smallest_gpu

    needs = estimate_ways(scenario)
    pieces = add_batch(scenario.settings.training, scenario.settings.data, validation)
    for way, need in needs.items():
        size = find_smallest_gpu(need)
        fitting = f"one GPU of {size} GB holds that" if size else "no single GPU holds that"
        validation.memory[way + pieces] = {"gpu_gib": size, **need.describe()}
        validation.add_findings(
            "memory", "ok", [f"{way}{pieces} needs {show_bytes(need.total_bytes)} on a GPU: {fitting}"]
        )


def add_batch(training: TrainingSettings, data: DataSettings, validation: Validation) -> str:
    """Add the formula of a global batch, and return words for the rows of a device. Without one there are none."""
    rows = find_global_batch(training, data)
    if rows is None:
        return ""
    size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    validation.add_findings("batch", "ok", [describe_batch(size, rows // (size * steps), steps)])
    return f" of {size} rows a device"


def collect_sections(settings: Settings) -> "MemorySettings":
    """Return the sections of the settings that memory depends on."""
    from llm_trainer.model.memory.scenario import MemorySettings

    work = settings.data, settings.training, settings.parallelism, settings.methods
    return MemorySettings(settings.model, settings.adapter, *work)
