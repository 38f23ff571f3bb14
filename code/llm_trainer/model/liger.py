# SPDX-License-Identifier: Apache-2.0
"""Liger's fused Triton kernels (Hsu et al. 2024, arXiv:2410.10989) for RMSNorm, rotary embeddings and SwiGLU.

The loss is TRL's: its chunked LM head never holds the logits of a whole batch either, and excludes Liger's.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.device import Device

# The loss is TRL's, and Liger's layer norm would take the place of PyTorch's own class in the whole process.
LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False}
# Kernels by the names of Liger's options, which are on by default, and of its modules.
KERNELS = {"rms_norm": "RMSNorm", "rope": "rotary embeddings", "swiglu": "SwiGLU", "geglu": "GEGLU"}
# What Liger's code raises for a model that it was not written for, or for a kernel that it lacks.
MISFITS = (ImportError, AttributeError, TypeError, ValueError, NotImplementedError)
# The model types that the pinned Liger has kernels for, where an estimate is made without it. qwen3_5_moe is left out:
# Liger's function for it imports a class that Liger lacks.
KNOWN_TYPES = frozenset(
    {
        "deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3",
        "gemma3_text", "gemma4", "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss", "granite",
        "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl", "llama", "llama4", "llama4_text", "llava", "ministral",
        "mistral", "mixtral", "mllama", "mllama_text_model", "muse_glimmer", "nemotron", "olmo2", "olmo3",
        "paligemma", "phi3", "pixtral", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text",
        "qwen3", "qwen3_5", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe",
        "qwen3_vl_moe_text", "qwen3_vl_text", "smollm3", "smolvlm"
    }
)  # fmt: skip


@dataclass(frozen=True)
class LigerChoice:
    """The decision whether the model gets Liger's kernels, and the reason in words."""

    is_on: bool
    reason: str
    kernels: frozenset[str] = frozenset()  # those of KERNELS that it gets

    def collect_options(self, settings: ModelSettings) -> dict[str, Any]:
        """Return keywords for Liger's function: those of the settings, and False for kernels that are left out."""
        return {**(settings.liger_kernel_config or {}), **dict.fromkeys(KERNELS.keys() - self.kernels, False)}

    def __str__(self) -> str:
        names = ", ".join(name for kernel, name in KERNELS.items() if kernel in self.kernels)
        first, comma, last = names.rpartition(", ")
        given = f"{first} and {last}; " if comma else f"{last}; " if last else ""
        return f"Liger kernels: {'on' if self.is_on else 'off'} ({given}{self.reason})"


def choose_liger(
    config: PreTrainedConfig, settings: ModelSettings, device: Device, known: frozenset[str] | None
) -> LigerChoice:
    """Return whether the model gets Liger's kernels: wherever it can, unless the settings say no.

    `known` holds the model types that the installed Liger has kernels for, or is None (`find_known_types`).
    Raise UserError where the settings ask for kernels that the model cannot get.
    """
    if settings.use_liger_kernel is False:
        return LigerChoice(False, "use_liger_kernel=false")
    options = settings.liger_kernel_config or {}
    if lost := [name for name in LEFT_OUT if options.get(name)]:
        raise UserError(f"liger_kernel_config has {lost[0]}=true: the loss is TRL's, and layer norms stay: remove it.")
    if obstacle := find_obstacle(config.model_type, device, known):
        return refuse_liger(settings, obstacle)
    return LigerChoice(True, "the loss is TRL's", frozenset(name for name in KERNELS if options.get(name, True)))


def refuse_liger(settings: ModelSettings, obstacle: str) -> LigerChoice:
    """Return that Liger is off for this reason. Raise UserError where the settings ask for it."""
    if settings.use_liger_kernel or settings.liger_kernel_config:
        asked = "use_liger_kernel=true" if settings.use_liger_kernel else "liger_kernel_config"
        raise UserError(f"{asked}: {obstacle}: leave it out.")
    return LigerChoice(False, obstacle)


def leave_out_experts(choice: LigerChoice, settings: ModelSettings, has_experts: bool) -> LigerChoice:
    """Return a choice without Liger's kernel for experts, unless the settings ask for it by `swiglu`.

    It tries its variants for two minutes in the first step (H200, qwen3_moe), and multiplies float32 in TF32. Autocast
    does not reach it: full fine-tuning would compute the experts in float32. No gain of it has been measured.
    """
    is_asked_for = "swiglu" in (settings.liger_kernel_config or {})
    if not (choice.is_on and has_experts) or is_asked_for:
        return choice
    return replace(choice, reason=f"not the experts; {choice.reason}", kernels=choice.kernels - {"swiglu"})


def try_on(choice: LigerChoice, settings: ModelSettings, skeleton: PreTrainedModel) -> LigerChoice:
    """Return the choice with the kernels that Liger's own code really gives to a model of this skeleton.

    Liger is off where that code fails. Raise UserError where the settings ask for it then.
    """
    if not choice.is_on:
        return choice
    try:
        kernels = find_given_kernels(skeleton, choice.collect_options(settings))
    except MISFITS as error:
        model_type = skeleton.config.model_type
        return refuse_liger(settings, f"liger-kernel's code for model type {model_type} fails: {quote_error(error)}")
    return replace(choice, kernels=kernels) if kernels else LigerChoice(False, "no kernel is left to switch on")


def find_given_kernels(skeleton: PreTrainedModel, options: Mapping[str, Any]) -> frozenset[str]:
    """Return which of KERNELS a model of this skeleton gets. The skeleton and its code stay as they are."""
    model = copy.deepcopy(skeleton)
    shared = list(list_shared_names(model))
    try:
        call_liger(model, options)
        own = [vars(part)["forward"] for part in model.modules() if "forward" in vars(part)]
        replaced = [getattr(module, name) for module, name, plain in shared if getattr(module, name) is not plain]
        homes = {fused.__module__ for fused in (*own, *replaced) if not isinstance(fused, type)}
    finally:
        for module, name, plain in shared:
            setattr(module, name, plain)
    return frozenset(kernel for kernel in KERNELS if any(home.endswith(kernel) for home in homes))


def find_obstacle(model_type: str, device: Device, known: frozenset[str] | None) -> str | None:
    """Return why a model of this type cannot get Liger's kernels here, as the end of a sentence, or None."""
    if not device.is_gpu:
        return "they need an NVIDIA GPU"
    if known is None:
        return "liger-kernel is not installed"
    if model_type not in known:
        return f"liger-kernel has none for model type {model_type}"
    return None


def find_known_types(device: Device) -> frozenset[str] | None:
    """Return the model types that the installed Liger has kernels for.

    For a GPU elsewhere those of the image's count. None means that it is not installed, or that the device is no GPU
    and has no use for it.
    """
    if not device.is_here:
        return KNOWN_TYPES
    if not device.is_gpu or find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return frozenset(MODEL_TYPE_TO_APPLY_LIGER_FN)


def apply_liger(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Give this model Liger's kernels, and no other model. `options` are keywords of Liger's function for its type.

    Liger also replaces names in the model's module. Classes there serve models that are built later, such as the
    merge's on a CPU, where Triton does not run: they are put back. Functions are shared by all models: they choose by
    the device of their input. Transformers' own `use_liger_kernel` does neither, and TRL's warns that it is deprecated.
    """
    shared = list(list_shared_names(model))
    call_liger(model, options)
    for module, name, plain in shared:
        fused = getattr(module, name)
        if fused is not plain:
            setattr(module, name, plain if isinstance(plain, type) else dispatch_by_device(fused, plain))


def call_liger(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Have Liger put its kernels on a model and into the module of its code."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, **{**options, **LEFT_OUT})


def list_shared_names(model: PreTrainedModel) -> Iterator[tuple[ModuleType, str, Any]]:
    """Yield the classes and functions of the modules of a model's code: module, name and what it stands for."""
    for module in {type(part).__module__ for part in model.modules()}:
        if module.startswith("transformers."):
            for name, plain in vars(sys.modules[module]).items():
                if isinstance(plain, (type, FunctionType)):
                    yield sys.modules[module], name, plain


def dispatch_by_device(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls the fused one for tensors on a GPU, and the plain one elsewhere."""

    @functools.wraps(plain)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if tensor.is_cuda else plain)(tensor, *args, **kwargs)

    return call
