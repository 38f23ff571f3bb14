# SPDX-License-Identifier: Apache-2.0
"""Memory that a job needs on a GPU, for `validate` and `plan`."""

from typing import TYPE_CHECKING

from llm_trainer.cli.validation import Validation
from llm_trainer.common.errors import UserError
from llm_trainer.common.units import show_bytes
from llm_trainer.config.checks import count_devices
from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import Settings
from llm_trainer.host.nvidia_driver import read_driver
from llm_trainer.readers.sources import find_validation_sources

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target


def examine_memory(
    config: "PreTrainedConfig", settings: Settings, environment: Environment, longest_row: int, validation: Validation
) -> "MemoryScenario | None":
    """Add what the job needs of the GPUs that are here, or of whichever GPUs it will run on.

    `longest_row` is the length of the longest row in tokens. Return what was looked at, None where it is not known.
    """
    from llm_trainer.model.memory.shape import UnknownShapeError

    try:
        target = find_gpus(settings, environment)
        evaluates = bool(find_validation_sources(settings.data, environment)[0])
        if target:
            scenario = build_scenario(config, settings, longest_row, target, evaluates)
            fit_here(scenario, validation)
        else:
            scenario = build_elsewhere(config, settings, longest_row, evaluates)
            fit_elsewhere(scenario, validation)
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
    config: "PreTrainedConfig", settings: Settings, longest_row: int, target: "Target", evaluates: bool
) -> "MemoryScenario":
    """Return the job on these GPUs, with the kernels that the image has for them."""
    from llm_trainer.model.memory.fit import add_fused_kernels
    from llm_trainer.model.memory.scenario import MemoryScenario

    sections, attention = collect_sections(settings), choose_attention(settings)
    return add_fused_kernels(MemoryScenario(config, sections, longest_row, target, attention, evaluates=evaluates))


def fit_here(scenario: "MemoryScenario", validation: Validation) -> None:
    """Add how the job would fit on these GPUs."""
    from llm_trainer.model.memory.fit import choose_memory_plan
    from llm_trainer.model.memory.global_batch import split_global_batch

    scenario = split_global_batch(scenario)
    plan = choose_memory_plan(scenario)
    validation.memory = plan.describe()
    validation.add_findings("memory", "warning" if plan.warning else "ok", [plan.warning or plan.reason])


def build_elsewhere(
    config: "PreTrainedConfig", settings: Settings, longest_row: int, evaluates: bool
) -> "MemoryScenario":
    """Return the job on one current GPU, which need not be here."""
    from llm_trainer.model.memory.fit import move_elsewhere

    return move_elsewhere(config, collect_sections(settings), longest_row, choose_attention(settings), evaluates)


def fit_elsewhere(scenario: "MemoryScenario", validation: Validation) -> None:
    """Add what each way of training needs, and the smallest GPU that holds it."""
    from llm_trainer.model.memory.fit import estimate_ways
    from llm_trainer.model.memory.remedies import find_smallest_gpu

    for way, need in estimate_ways(scenario).items():
        size = find_smallest_gpu(need)
        fitting = f"one GPU of {size} GB holds that" if size else "no single GPU holds that"
        validation.memory[way] = {"gpu_gib": size, **need.describe()}
        validation.add_findings("memory", "ok", [f"{way} needs {show_bytes(need.total_bytes)} on a GPU: {fitting}"])


def collect_sections(settings: Settings) -> "MemorySettings":
    """Return the sections of the settings that memory depends on."""
    from llm_trainer.model.memory.scenario import MemorySettings

    return MemorySettings(settings.model, settings.adapter, settings.data, settings.training, settings.parallelism)


def choose_attention(settings: Settings) -> str:
    """Return the attention kernel that the user asks for, else the one that a GPU would get."""
    from llm_trainer.model.memory.fit import ATTENTION_ELSEWHERE

    asked = settings.model.attn_implementation
    return ATTENTION_ELSEWHERE if asked == "auto" else asked
