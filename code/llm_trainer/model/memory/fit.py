# SPDX-License-Identifier: Apache-2.0
"""The choice of how a job fits its devices: the cheapest way whose estimate is below what is free."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_world_size, world_size
from llm_trainer.common.units import show_bytes
from llm_trainer.model.attention import choose_attention, find_faults, read_needs
from llm_trainer.model.device import Device, find_free_memory
from llm_trainer.model.liger import KNOWN_TYPES, choose_liger, leave_out_experts
from llm_trainer.model.lora import find_base_model
from llm_trainer.model.memory.batch import Batch
from llm_trainer.model.memory.estimate import Estimate
from llm_trainer.model.memory.remedies import list_remedies
from llm_trainer.model.memory.scenario import (
    MemoryScenario,
    MemorySettings,
    ParallelismPlan,
    Target,
    list_parallelism_plans,
)
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError
from llm_trainer.model.precision import check_arguments

ELSEWHERE = Device(torch.device("cuda"), "a GPU elsewhere", (9, 0), is_here=False)
NUM_REMEDIES = 3
# Layers that could be recomputed keep their activations up to this share of what is free: the estimate may be too low.
KEPT_SHARE = 0.97


@dataclass(frozen=True)
class MemoryPlan:
    """The way that was chosen, and the reason in words."""

    parallelism: ParallelismPlan
    estimate: Estimate | None  # None where the model's code cannot run on tensors without numbers
    reason: str
    warning: str = ""
    shape: ModelShape | None = None  # None where it is not known

    @property
    def distribution(self) -> Literal["ddp", "fsdp"]:
        """The setting `distribution` that this way stands for."""
        return "fsdp" if self.parallelism.sharded else "ddp"

    @property
    def sharded(self) -> bool:
        """True where FSDP shards the model."""
        return self.parallelism.sharded

    @property
    def gradient_checkpointing(self) -> bool:
        """True where activations are computed again in the backward pass."""
        return self.parallelism.recompute_activations

    @property
    def kept_layers(self) -> int:
        """The number of layers, the last ones, that keep their activations where others are recomputed."""
        return self.parallelism.kept_layers

    @property
    def activation_offloading(self) -> bool:
        """True where activations wait in the host's memory."""
        return self.parallelism.offload_activations

    def describe(self) -> dict[str, Any]:
        """Return the plan as values of JSON."""
        return {
            "distribution": self.distribution,
            "gradient_checkpointing": self.gradient_checkpointing,
            "kept_layers": self.kept_layers,
            "activation_offloading": self.activation_offloading,
            "reason": self.reason,
            "estimate": self.estimate.describe() if self.estimate else None,
        }

    def expect_peak(self, scenario: MemoryScenario, batches: Iterable[Batch]) -> Estimate | None:
        """Return what a step of the batch among these takes that takes the most. None: it is not known.

        Where the batches are not known, that is the largest that may come.
        """
        scenarios = [replace(scenario, known_batch=batch, known_shape=self.shape) for batch in batches]
        if self.estimate is None or not scenarios:
            return self.estimate
        needs = [each.estimate(self.parallelism) for each in scenarios]
        return max(needs, key=lambda need: need.total_bytes)

    def compare(self, expected: Estimate | None, measured_bytes: int) -> dict[str, Any]:
        """Return the plan as values of JSON, with the measured peak beside what was expected of the batches."""
        values = {**self.describe(), "measured_peak_bytes": measured_bytes}
        comparison = f"measured peak {show_bytes(measured_bytes)}"
        if expected:
            values["expected_peak_bytes"] = expected.peak_bytes
            comparison = f"expected of its batches {show_bytes(expected.peak_bytes)}, {comparison}"
        return {**values, "comparison": comparison}


def choose_memory_plan(scenario: MemoryScenario, earlier: str | None = None) -> MemoryPlan:
    """Return the cheapest way that fits, out of those that the settings leave open.

    `earlier` is the distribution of a run that this one goes on from. A run that was sharded stays so where the
    settings leave it open. One that was not may have begun on larger devices.
    Raise UserError where no way fits, with the cheapest changes that make the job fit. With `check_memory=false` the
    way that takes the least memory is returned instead, with a warning.
    """
    settings, target = scenario.settings, scenario.target
    if earlier == "fsdp" and settings.parallelism.distribution == "auto" and target.world_size > 1:
        scenario = replace(scenario, settings=settings.replace(distribution=earlier))
    free, refused = show_bytes(target.free_bytes), list[str]()
    try:
        for plan, need, fits in try_plans(scenario):
            name, size = plan.describe(target.world_size), f"{show_bytes(need.total_bytes)} a {target.unit}"
            if fits:
                needs = f"{', '.join(refused) or f'{name} needs {size}'} and {free} are free"
                reason = f"{needs}: {name}, {size}" if refused else needs
                return MemoryPlan(plan, need, reason, shape=scenario.shape)
            refused.append(f"{name} needs {size}")
    except UnknownShapeError as error:
        plans = list_parallelism_plans(scenario.settings, target)
        return choose_without_estimate(plans, target, f"the model's memory is not known, since {error}")
    problem = f"The job needs {size} with {name} and {free} are free"
    if not settings.parallelism.check_memory:
        warning = f"{problem}: it may run out of memory."
        return MemoryPlan(plan, need, f"{problem}, and check_memory=false", warning, scenario.shape)
    raise UserError(f"{problem}; {describe_remedies(scenario)}.")


def try_plans(scenario: MemoryScenario) -> Iterator[tuple[ParallelismPlan, Estimate, bool]]:
    """Yield the ways that the settings leave open, the cheapest first, with what each needs, and whether that fits.

    Raise UnknownShapeError.
    """
    for each in list_parallelism_plans(scenario.settings, scenario.target):
        plan, need = keep_layers(scenario, each)
        yield plan, need, scenario.can_hold(need, find_share(scenario, plan))


def keep_layers(scenario: MemoryScenario, plan: ParallelismPlan) -> tuple[ParallelismPlan, Estimate]:
    """Return a way in which only as many layers are recomputed as must be, and what it needs. Raise UnknownShapeError.

    The first layers are recomputed. When their turn comes, the activations of the others are gone. A way that the
    settings ask for comes back as it is, and so does one that does not fit. Offloading moves what layers would keep.
    """
    need, shape = scenario.estimate(plan), scenario.shape
    is_open = scenario.settings.parallelism.gradient_checkpointing is None
    if not (is_open and plan.recompute_activations and shape.can_recompute_some) or plan.offload_activations:
        return plan, need

    def keep(number: int) -> ParallelismPlan:
        return replace(plan, kept_layers=number, num_layers=shape.num_layers)

    def is_too_much(number: int) -> bool:
        return not scenario.can_hold(scenario.estimate(keep(number)), KEPT_SHARE)

    number = bisect_left(range(1, shape.num_layers), True, key=is_too_much)
    return (keep(number), scenario.estimate(keep(number))) if number else (plan, need)


def find_share(scenario: MemoryScenario, plan: ParallelismPlan) -> float:
    """Return the share of what is free that a way may need. More layers could be recomputed where that is left open."""
    is_open = scenario.settings.parallelism.gradient_checkpointing is None
    return KEPT_SHARE if is_open and not plan.recompute_activations else 1.0


def describe_remedies(scenario: MemoryScenario) -> str:
    """Return words for the cheapest changes that make the job fit."""
    remedies = list(islice(list_remedies(scenario), NUM_REMEDIES))
    return f"what makes it fit: {'; or '.join(remedies)}" if remedies else "use a smaller model, or larger devices"


def describe_memory_plan(plan: MemoryPlan) -> Iterator[str]:
    """Yield the plan's lines for the log."""
    yield f"Memory: {plan.reason}"
    yield from plan.estimate.as_table() if plan.estimate else ()
    if plan.warning:
        yield f"Warning: {plan.warning}"


def choose_without_estimate(plans: list[ParallelismPlan], target: Target, reason: str) -> MemoryPlan:
    """Return the first way that recomputes activations on a GPU, as most models need there, or else the first."""
    plan = next((plan for plan in plans if plan.recompute_activations == target.on_gpu), plans[0])
    return MemoryPlan(plan, None, reason, f"{reason[0].upper()}{reason[1:]}.")


def move_elsewhere(
    config: PreTrainedConfig, settings: MemorySettings, longest_row: int, evaluates: bool = False
) -> MemoryScenario:
    """Return a job on one current GPU, which need not be here. The longest row is in tokens.

    Raise UserError where the settings ask for kernels that the model cannot get.
    """
    target = Target(ELSEWHERE, world_size=1, free_bytes=0)
    return choose_kernels(MemoryScenario(config, settings, longest_row, target, evaluates=evaluates))


def estimate_ways(scenario: MemoryScenario) -> dict[str, Estimate]:
    """Return what each way that the settings leave open needs. Raise UnknownShapeError.

    Offloading is left out unless it is asked for.
    """
    asked = scenario.settings.parallelism.activation_offloading
    plans = list_parallelism_plans(scenario.settings, scenario.target)
    return {
        plan.describe(scenario.target.world_size): scenario.estimate(plan)
        for plan in plans
        if asked or not plan.offload_activations
    }


def choose_kernels(scenario: MemoryScenario) -> MemoryScenario:
    """Return a scenario with the kernels that the image has for its model and devices: attention's, and Liger's.

    The packages of a GPU elsewhere need not be here. Raise UserError where the settings ask for kernels that the model
    cannot get, or for number types that the devices lack.
    """
    settings, device = scenario.settings.model, scenario.target.device
    check_arguments(scenario.settings.training, device)
    liger = choose_liger(scenario.config, settings, device, KNOWN_TYPES)
    try:
        shape = scenario.shape
    except UnknownShapeError:  # told where the estimate is made
        return scenario
    needs = read_needs(find_base_model(shape.skeleton))
    asked, compute = settings.attn_implementation, scenario.dtypes[1]
    attention = choose_attention(needs, asked, compute, device, find_faults(device))
    liger = leave_out_experts(liger, settings, bool(shape.count_weights("experts")))
    return replace(scenario, attention=attention.name, fused_kernels=liger.kernels, known_shape=shape)


def find_target(device: Device, group: dist.ProcessGroup | None) -> Target:
    """Return this job's devices. Every rank must call this: all get the least that is free on any device.

    What is free on a GPU is measured when CUDA's context is there, and the estimate counts a context too. That leaves
    about 0.5 GiB for what comes later, such as kernels that are loaded when they are first used.
    """
    free_bytes = find_free_memory(device) // (1 if device.is_gpu else local_world_size())
    if group is not None:
        least = torch.tensor(free_bytes)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        free_bytes = int(least)
    return Target(device, world_size(), free_bytes)
