# SPDX-License-Identifier: Apache-2.0
"""Liger's fused Triton kernels (Hsu et al. 2024, arXiv:2410.10989) for RMSNorm, rotary embeddings and SwiGLU.

The loss is TRL's: its chunked LM head never holds the logits of a whole batch either, and excludes Liger's.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device

# The loss is TRL's, and Liger's layer norm would take the place of PyTorch's own class in the whole process.
LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False}


@dataclass(frozen=True)
class LigerChoice:
    """Whether the model gets Liger's kernels, and why."""

    is_on: bool
    reason: str

    def __str__(self) -> str:
        return f"Liger kernels: {'on' if self.is_on else 'off'} ({self.reason})"


def choose_liger(
    config: PreTrainedConfig, settings: Settings, device: Device, known: frozenset[str] | None
) -> LigerChoice:
    """On where they can be, unless the settings say no. `known`: model types with kernels; None: Liger is not there.

    Raises UserError where the settings ask for them and they cannot be.
    """
    if settings.model.use_liger_kernel is False:
        return LigerChoice(False, "use_liger_kernel=false")
    asked = "use_liger_kernel=true" if settings.model.use_liger_kernel else "liger_kernel_config"
    options = settings.model.liger_kernel_config or {}
    if lost := [name for name in LEFT_OUT if options.get(name)]:
        raise UserError(f"liger_kernel_config has {lost[0]}=true: the loss is TRL's, and layer norms stay: remove it.")
    obstacle = None
    if not device.is_gpu:
        obstacle = "they need an NVIDIA GPU"
    elif known is None:
        obstacle = "liger-kernel is not installed"
    elif config.model_type not in known:
        obstacle = f"liger-kernel has none for model type {config.model_type}"
    if obstacle and (settings.model.use_liger_kernel or options):
        raise UserError(f"{asked}: {obstacle}: leave it out.")
    if obstacle:
        return LigerChoice(False, obstacle)
    return LigerChoice(True, "RMSNorm, rotary embeddings and SwiGLU; the loss is TRL's")


def find_known_types(device: Device) -> frozenset[str] | None:
    """The model types that the installed Liger has kernels for; None where it is not installed, or has no use."""
    if not device.is_gpu or find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return frozenset(MODEL_TYPE_TO_APPLY_LIGER_FN)


def apply_liger(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Give this model the kernels, and no other one; `options` are keywords of Liger's function for its type.

    Liger also exchanges names of the model's module: for models built later, which here are merged on the CPU, where
    Triton does not run, and for the functions that all models share. The former are put back; the latter go by device.
    Transformers' use_liger_kernel would do neither, and TRL's warns that it is deprecated.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    modules = {type(part).__module__ for part in model.modules()}
    before = [
        (sys.modules[module], name, plain)
        for module in modules
        for name, plain in vars(sys.modules[module]).items()
        if module.startswith("transformers.") and isinstance(plain, (type, FunctionType))
    ]
    _apply_liger_kernel_to_instance(model=model, **{**options, **LEFT_OUT})
    for module, name, plain in before:
        fused = getattr(module, name)
        if fused is not plain:
            setattr(module, name, plain if isinstance(plain, type) else dispatch_by_device(fused, plain))


def dispatch_by_device(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The fused function for tensors on a GPU, the plain one elsewhere."""

    @functools.wraps(plain)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if tensor.is_cuda else plain)(tensor, *args, **kwargs)

    return call
