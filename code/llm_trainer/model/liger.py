# SPDX-License-Identifier: Apache-2.0
"""Liger's fused Triton kernels (Hsu et al. 2024, arXiv:2410.10989) for RMSNorm, rotary embeddings and SwiGLU.

The loss is TRL's: its chunked LM head never holds the logits of a whole batch either, and excludes Liger's.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.device import Device
from llm_trainer.model.parameter_roles import assign_roles
from llm_trainer.model.precision import Precision, show_dtype

# The loss is TRL's, and Liger's layer norm would take the place of PyTorch's own class in the whole process.
LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False}
KERNELS = ("rope", "rms_norm", "swiglu", "geglu")  # by the names of Liger's options, which are on by default
# The model types that the pinned Liger has kernels for, where an estimate is made without it.
KNOWN_TYPES = frozenset(
    {
        "deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3",
        "gemma3_text", "gemma4", "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss", "granite",
        "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl", "llama", "llama4", "llama4_text", "llava", "ministral",
        "mistral", "mixtral", "mllama", "mllama_text_model", "muse_glimmer", "nemotron", "olmo2", "olmo3",
        "paligemma", "phi3", "pixtral", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text",
        "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl",
        "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "smollm3", "smolvlm"
    }
)  # fmt: skip


@dataclass(frozen=True)
class LigerChoice:
    """The decision whether the model gets Liger's kernels, and the reason in words."""

    is_on: bool
    reason: str
    kernels: frozenset[str] = frozenset()  # those of KERNELS that it gets

    @property
    def switched_off(self) -> dict[str, bool]:
        """Liger's options for the kernels that the model does not get."""
        return dict.fromkeys(set(KERNELS) - self.kernels, False)

    def __str__(self) -> str:
        return f"Liger kernels: {'on' if self.is_on else 'off'} ({self.reason})"


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
    obstacle = find_obstacle(config.model_type, device, known)
    if obstacle and (settings.use_liger_kernel or options):
        asked = "use_liger_kernel=true" if settings.use_liger_kernel else "liger_kernel_config"
        raise UserError(f"{asked}: {obstacle}: leave it out.")
    if obstacle:
        return LigerChoice(False, obstacle)
    kernels = frozenset(name for name in KERNELS if options.get(name, True))
    return LigerChoice(True, "RMSNorm, rotary embeddings and SwiGLU; the loss is TRL's", kernels)


def leave_out_experts(
    choice: LigerChoice, settings: ModelSettings, skeleton: PreTrainedModel, precision: Precision
) -> LigerChoice:
    """Return a choice without Liger's experts where these would compute in another type than the job.

    Autocast does not reach them. They compute in the type of the weights, which full fine-tuning keeps in float32.
    """
    has_experts = any(role == "experts" for _, role in assign_roles(skeleton))
    is_asked_for = "swiglu" in (settings.liger_kernel_config or {})
    if not (choice.is_on and has_experts) or precision.weights == precision.compute or is_asked_for:
        return choice
    reason = (
        "RMSNorm and rotary embeddings; not the experts, which Liger would compute in the weights' "
        f"{show_dtype(precision.weights)}; the loss is TRL's"
    )
    return replace(choice, reason=reason, kernels=choice.kernels - {"swiglu"})


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

    None means that it is not installed, or that the device is no GPU and has no use for it.
    """
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
    """Return a function that calls the fused one for tensors on a GPU, and the plain one elsewhere."""

    @functools.wraps(plain)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if tensor.is_cuda else plain)(tensor, *args, **kwargs)

    return call
