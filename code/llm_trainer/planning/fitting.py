# SPDX-License-Identifier: Apache-2.0
"""The way in which a job fits a number of GPUs of a kind. They need not be here. Whatever takes long is shared."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from llm_trainer.common.errors import UserError
from llm_trainer.common.units import show_bytes
from llm_trainer.config.global_batch import find_batch_problem
from llm_trainer.model.device import Device
from llm_trainer.model.layers.float8 import check_float8
from llm_trainer.model.memory.estimate import CONTEXT_BYTES, Estimate
from llm_trainer.model.memory.fit import choose_kernels, try_plans
from llm_trainer.model.memory.global_batch import split_global_batch
from llm_trainer.model.memory.gpus import Gpu
from llm_trainer.model.memory.scenario import (
    MemoryScenario,
    ParallelismPlan,
    Target,
    list_parallelism_plans,
)
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError, read_shape
from llm_trainer.model.precision import choose_precision
from llm_trainer.planning.formula import estimate_by_formula


@dataclass(frozen=True)
class Fit:
    """A job on a number of GPUs: the batch of a device in `scenario`, and the way that fits, or takes the least."""

    scenario: MemoryScenario
    plan: ParallelismPlan
    need: Estimate
    fits: bool
    by_formula: bool = False

    @property
    def refusal(self) -> str:
        """Words on why it does not fit; empty where it does."""
        free = self.scenario.target.free_bytes
        return "" if self.fits else f"needs {show_bytes(self.need.total_bytes)} a GPU, {show_bytes(free)} are free"


@dataclass(eq=False)
class Fitter:
    """A job as far as its memory depends on it, on whatever devices, with what is known of it on others."""

    job: MemoryScenario
    shapes: dict[torch.dtype, ModelShape] = field(default_factory=dict)  # by the type of the weights
    scenarios: dict[str, MemoryScenario] = field(default_factory=dict)  # by the name of the GPU

    def fit(self, gpu: Gpu, num_gpus: int) -> Fit:
        """Return how the job fits so many GPUs.

        Raise UserError where they cannot do what the settings ask for, and UnknownShapeError.
        """
        if gpu.name not in self.scenarios:
            self.scenarios[gpu.name] = self.move_to(gpu)
        settings = self.job.settings
        if problems := list(find_batch_problem(settings.training, settings.data, num_gpus)):
            raise UserError(*problems)
        return fit_target(split_global_batch(self.scenarios[gpu.name].replace_target(world_size=num_gpus)))

    def move_to(self, gpu: Gpu) -> MemoryScenario:
        """Return the job on one GPU. Raise UserError where it cannot do what the settings ask for."""
        settings, device = self.job.settings, find_elsewhere(gpu)
        if settings.model.base_compute == "fp8":
            check_float8(device, choose_precision(settings.model, settings.adapter, device).compute)
        moved = replace(self.job, target=Target(device, 1, count_free_bytes(gpu)), known_shape=None)
        return choose_kernels(replace(moved, known_shape=self.find_shape(moved.dtypes[0])))

    def find_shape(self, dtype: torch.dtype) -> ModelShape:
        """Return the shape with weights of a type, or of one of the same size, which holds and moves as much."""
        if not self.shapes:
            self.shapes[self.job.dtypes[0]] = self.job.shape
        if dtype not in self.shapes:
            alike = (shape for known, shape in self.shapes.items() if known.itemsize == dtype.itemsize)
            settings = self.job.settings
            self.shapes[dtype] = next(alike, None) or read_shape(
                self.job.config, settings.model, settings.adapter, weights_dtype=dtype
            )
        return self.shapes[dtype]


def find_elsewhere(gpu: Gpu) -> Device:
    """Return a GPU as the device of another machine."""
    return Device(torch.device("cuda"), gpu.name, gpu.capability, is_here=False)


def count_free_bytes(gpu: Gpu) -> int:
    """Return what is free on a GPU when CUDA's context is there."""
    return gpu.memory_bytes - CONTEXT_BYTES


def fit_target(scenario: MemoryScenario) -> Fit:
    """Return how a job fits its target: the cheapest way that fits, else the one that takes the least memory."""
    try:
        return choose_fit(Fit(scenario, *way) for way in try_plans(scenario))
    except UnknownShapeError:
        return fit_by_formula(scenario)


def choose_fit(tried: Iterator[Fit]) -> Fit:
    """Return the first that fits, else the last."""
    for fit in tried:
        if fit.fits:
            break
    return fit


def fit_by_formula(scenario: MemoryScenario) -> Fit:
    """Return how a job fits its target, for a model whose code does not run without numbers."""
    plans = list_parallelism_plans(scenario.settings, scenario.target)
    needs = ((plan, estimate_by_formula(scenario, plan)) for plan in plans)
    return choose_fit(Fit(scenario, plan, need, scenario.can_hold(need), by_formula=True) for plan, need in needs)
