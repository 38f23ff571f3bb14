# SPDX-License-Identifier: Apache-2.0
"""The attention kernel that a model is trained with: the fastest right one that is installed, or the one asked for.

Only installed packages count: Transformers would fetch other kernels from the Hub.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import torch
from transformers import PreTrainedModel
from transformers.utils.versions import require_version

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.model.device import Device
from llm_trainer.model.layers import torch_flash
from llm_trainer.model.precision import show_dtype

# Fastest first. flash-attention 3 and 4 are written for Hopper and Blackwell. PyTorch's own copy of 2 comes after the
# package, which has more: soft-capping, dropout and heads of any size.
KERNELS = (
    *("flash_attention_3", "flash_attention_4", "flash_attention_2", torch_flash.NAME),
    *("sdpa", "flex_attention", "eager"),
)
# The module of each kernel, and its distribution from the version on that has soft-capping, or the backward pass of
# attention sinks.
PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn>=2.6.0"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4>=4.0.0b36"),
    "flex_attention": ("triton", "triton"),
}
# What the kernels' own sources demand. For flash_attention_4 that is flash_attn/cute/interface.py of 4.0.0b36, where
# both passes count. For PyTorch's it is aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
CAPABILITIES: dict[str, Callable[[tuple[int, int]], bool]] = {
    "flash_attention_2": lambda capability: capability >= (8, 0),
    "flash_attention_3": lambda capability: capability == (9, 0),
    "flash_attention_4": lambda capability: (9, 0) <= capability < (12, 0),
    torch_flash.NAME: lambda capability: (8, 0) <= capability <= (12, 1),
    "flex_attention": lambda capability: capability >= (8, 0),
}
IN_IMAGE = ("flash_attention_2", "flex_attention")  # its GPU variant has their packages
WITHOUT_SOFT_CAP = ("sdpa", torch_flash.NAME)
WITHOUT_DROPOUT = ("flex_attention", torch_flash.NAME)
HEADS_OF_EIGHTS = ("flash_attention_4", torch_flash.NAME)  # flash-attn pads others
SINKS = ("flash_attention_4", "flex_attention", "eager")  # only these take sinks (`s_aux`) in both passes
# Flex attention skips the blocks that packing masks, but each length of a row may take a minute's compilation. After
# eight of them torch computes it uncompiled (torch._dynamo.config.recompile_limit).
COMPILES = "compiles anew for rows of other lengths, and is taken only where it is asked for"
LARGEST_HEAD = 256
SMALLEST_FLEX_HEAD = 16


@dataclass(frozen=True)
class AttentionNeeds:
    """Demands of a model on an attention kernel."""

    model: str  # name of its class
    supported: frozenset[str]  # kernels that the classes of all its parts declare they can call
    head_sizes: frozenset[int]  # in numbers a head; some models have layers of two sizes
    has_sinks: bool  # learned weights in the softmax's sum that no value belongs to, as in gpt-oss
    has_soft_cap: bool  # tanh over the scores, as in Gemma 2
    dropout: float  # probability that an attention weight is dropped

    @property
    def largest_head(self) -> int:
        """The size of the largest head, in numbers; 0 for a model without attention."""
        return max(self.head_sizes, default=0)


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that was chosen, by Transformers' name, and the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"Attention: {self.name} ({self.reason})"


def choose_attention(
    needs: AttentionNeeds, asked: str, dtype: torch.dtype, device: Device, faults: Mapping[str, str]
) -> AttentionChoice:
    """Return the kernel that computes in `dtype` on the device. `asked` is the setting `attn_implementation`.

    `faults` holds the reasons why packages of kernels cannot be used (`find_faults`).
    Raise UserError for a kernel that the setting names and that cannot run here.
    """
    obstacles = {kernel: find_obstacle(kernel, needs, dtype, device) or faults.get(kernel) for kernel in KERNELS}
    usable = [kernel for kernel, obstacle in obstacles.items() if obstacle is None]
    if asked == "auto":
        obstacles["flex_attention"] = obstacles["flex_attention"] or COMPILES
        chosen = next(kernel for kernel in KERNELS if obstacles[kernel] is None)
        reasons: dict[str, list[str]] = {}
        for kernel in KERNELS[: KERNELS.index(chosen)]:
            reasons.setdefault(str(obstacles[kernel]), []).append(kernel)
        passed_over = "".join(f"; {', '.join(kernels)}: {reason}" for reason, kernels in reasons.items())
        return AttentionChoice(chosen, f"auto: the fastest that can run here{passed_over}")
    if obstacles[asked]:
        raise UserError(
            f"attn_implementation={asked}: {asked} {obstacles[asked]}: leave it out, or give one that can run here "
            f"({', '.join(usable)})."
        )
    return AttentionChoice(asked, "as asked for")


def find_obstacle(kernel: str, needs: AttentionNeeds, dtype: torch.dtype, device: Device) -> str | None:
    """Return why a kernel cannot run here or would compute something else, as the end of a sentence, or None."""
    is_flash = kernel.startswith("flash_attention")
    if kernel in CAPABILITIES:
        if device.capability is None:
            return "needs an NVIDIA GPU"  # flex attention is compiled for a CPU too, and wrongly by PyTorch 2.13
        if not CAPABILITIES[kernel](device.capability):
            return f"is not made for {device}"
    if is_flash and dtype == torch.float32:
        return f"computes in bfloat16 or float16, not in {show_dtype(dtype)}"
    if needs.has_sinks and kernel not in SINKS:
        return f"does not know the attention sinks of {needs.model}"
    if needs.has_soft_cap and kernel in WITHOUT_SOFT_CAP:
        return f"does not know the soft-capping of {needs.model}"
    if kernel not in needs.supported:
        return f"is not among those of {needs.model}"
    return find_size_obstacle(kernel, needs, device)


def find_size_obstacle(kernel: str, needs: AttentionNeeds, device: Device) -> str | None:
    """Return why a fused kernel does not take the model's heads, as the end of a sentence, or None."""
    if kernel not in CAPABILITIES:
        return None
    if needs.largest_head > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} and {needs.model} has {needs.largest_head}"
    if kernel in WITHOUT_DROPOUT and needs.dropout:
        return f"has no dropout and {needs.model} has attention_dropout={needs.dropout:g}"
    odd_sizes = [size for size in needs.head_sizes if size % 8]
    if kernel in HEADS_OF_EIGHTS and odd_sizes:
        return f"takes heads of a multiple of 8 and {needs.model} has {max(odd_sizes)}"
    if kernel == "flex_attention" and min(needs.head_sizes, default=SMALLEST_FLEX_HEAD) < SMALLEST_FLEX_HEAD:
        return f"takes heads of at least {SMALLEST_FLEX_HEAD} and {needs.model} has {min(needs.head_sizes)}"
    find_more = {"flash_attention_4": find_flash_4_obstacle, torch_flash.NAME: find_torch_flash_obstacle}
    return find_more[kernel](needs, device) if kernel in find_more else None


def find_flash_4_obstacle(needs: AttentionNeeds, device: Device) -> str | None:
    """Return why flash attention 4 does not take the model's heads on the device, as the end of a sentence, or None."""
    if device.capability is not None and device.capability[0] > 9:
        if not all(size <= 128 or size == LARGEST_HEAD for size in needs.head_sizes):
            return f"takes heads of up to 128 or of 256 on {device} and {needs.model} has {needs.largest_head}"
        if needs.largest_head == LARGEST_HEAD and (needs.has_sinks or needs.has_soft_cap):
            return f"has neither sinks nor soft-capping for heads of 256 on {device}"
    return None


def find_torch_flash_obstacle(needs: AttentionNeeds, device: Device) -> str | None:
    """Return why PyTorch's flash attention has no backward pass on the device, as the end of a sentence, or None."""
    capability = device.capability or (0, 0)
    has_small_blocks = (8, 6) <= capability <= (8, 9) or capability[0] == 12  # less shared memory than an A100
    if has_small_blocks and any(192 < size <= 224 for size in needs.head_sizes):
        return f"takes no heads of 193 to 224 on {device} and {needs.model} has {needs.largest_head}"
    return None


def read_needs(model: PreTrainedModel) -> AttentionNeeds:
    """Return what a model needs of a kernel. A skeleton without weights will do."""
    text = model.config.get_text_config()
    sizes = [getattr(module, "qk_head_dim", getattr(module, "head_dim", None)) for module in model.modules()]
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    dropout = getattr(text, "attention_dropout", getattr(text, "attn_pdrop", 0))
    return AttentionNeeds(
        model=type(model).__name__,
        supported=frozenset.intersection(*map(list_supported, parts)),
        head_sizes=frozenset(size for size in sizes if isinstance(size, int)),  # empty for a model without attention
        has_sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
        has_soft_cap=getattr(text, "attn_logit_softcapping", None) is not None,
        dropout=dropout or 0,
    )


def list_supported(part: PreTrainedModel) -> frozenset[str]:
    """Return the kernels that the class of a part declares. Transformers refuses a model with one that a part lacks."""
    supported = {"eager"}
    supported |= {"sdpa"} if part._supports_sdpa else set()
    supported |= {"flex_attention"} if part._supports_flex_attn else set()
    if part._supports_flash_attn:
        flash = {kernel for kernel in KERNELS if kernel.startswith("flash_attention")}
        supported |= flash & set(part._compatible_flash_implementations or flash)
    return frozenset(supported)


def find_faults(device: Device) -> dict[str, str]:
    """Return the kernels whose packages cannot be used, each with the reason as the end of a sentence.

    For a CPU no package is imported. For a GPU elsewhere the image's own packages count, which need not be here.
    """
    faults = {}
    if device.is_gpu and device.is_here and not torch.backends.cuda.is_flash_attention_available():
        faults[torch_flash.NAME] = "is not in this build of PyTorch"
    for kernel, (module, requirement) in PACKAGES.items():
        if kernel in IN_IMAGE and not device.is_here:
            continue
        try:
            require_version(requirement)
            if device.is_gpu and device.is_here:
                importlib.import_module(module)
        except PackageNotFoundError:
            faults[kernel] = "is not installed"
        except (ImportError, OSError, RuntimeError) as error:
            faults[kernel] = f"cannot be used ({quote_error(error)})"
    return faults
