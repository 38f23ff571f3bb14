# SPDX-License-Identifier: Apache-2.0
"""One step of a small layer with the arguments of a job, before anything is loaded.

Transformers reads the settings of optimizer, schedule, compiler and recomputation late: when the weights are loaded,
or at the first step. Here a mistake in them costs a moment.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, enable_full_determinism, get_scheduler
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from trl import SFTConfig

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.config.sections import METRIC_SCHEDULES

# Errors by which libraries refuse values that a user wrote.
REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, KeyError, AttributeError, AssertionError)
WIDTH = 64  # of the layer: bitsandbytes keeps the state of smaller ones in 32 bit
STEPS_OF_UNKNOWN_RUN = 1000


def rehearse_step(arguments: SFTConfig, device: torch.device) -> None:
    """Take a step on the device. Raises UserError for values that an optimizer, a schedule or PyTorch refuses."""
    if arguments.full_determinism:  # torch reads cuBLAS's variable at the process's first product, and never again
        enable_full_determinism(arguments.seed)
    layer = torch.nn.Linear(WIDTH, WIDTH, device=device)
    if arguments.torch_compile:
        backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
        with refused_as(f"torch_compile_backend={backend!r} with torch_compile_mode={mode!r}", "leave both out"):
            torch.compile(layer, backend=backend or "inductor", mode=mode)
    recomputation = arguments.activation_checkpointing_kwargs
    with refused_as(f"activation_checkpointing_kwargs={recomputation}", "leave it out"):
        output = checkpoint(layer, torch.ones(1, WIDTH, device=device, requires_grad=True), **recomputation)
        output.sum().backward()
    if not arguments.optim_target_modules:  # names modules of the model, which are not those of this layer
        rehearse_update(arguments, layer)


def rehearse_update(arguments: SFTConfig, layer: torch.nn.Module) -> None:
    """Update the layer, and then its learning rate. Raises UserError where optimizer or schedule refuses."""
    optim, optim_args = arguments.optim.value, arguments.optim_args
    optimizer_refusal = f"optim={optim} with optim_args={optim_args!r}", "write optim_args as key=value,key=value"
    kind, kwargs = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
    fix = "give lr_scheduler_kwargs what this schedule takes, or another schedule"
    schedule_refusal = f"lr_scheduler_type={kind} with lr_scheduler_kwargs={kwargs}", fix
    total = arguments.max_steps if arguments.max_steps > 0 else STEPS_OF_UNKNOWN_RUN
    with refused_as(*optimizer_refusal):
        optimizer = build_optimizer(arguments, layer)
    with refused_as(*schedule_refusal):
        warmup = arguments.get_warmup_steps(total)
        schedule = get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    with refused_as(*optimizer_refusal):
        optimizer.step()
    if kind not in METRIC_SCHEDULES:
        with refused_as(*schedule_refusal):
            schedule.step()


def build_optimizer(arguments: SFTConfig, layer: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a layer. Raises ValueError for an argument that it would not read, and what it raises."""
    source = inspect.getsource(_OPTIMIZER_HANDLERS[arguments.optim])
    for pair in (arguments.optim_args or "").replace(" ", "").split(","):
        if pair and f'"{pair.partition("=")[0]}"' not in source:
            raise ValueError(f"{pair!r} is nothing that it reads")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    optimizer: torch.optim.Optimizer = kind(layer.parameters(), **options)
    return optimizer


@contextmanager
def refused_as(what: str, fix: str) -> Iterator[Any]:
    """Turn a library's refusal into a UserError that names what was given, and what to do."""
    try:
        yield
    except REFUSALS as error:
        raise UserError(f"{what} is refused ({quote_error(error)}): {fix}.") from error
