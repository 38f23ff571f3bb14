# SPDX-License-Identifier: Apache-2.0
"""The number types of a job: of its computation, and of its weights in memory."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import list_weights, read_header
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; before it, PyTorch emulates bfloat16, and says that it is supported


@dataclass(frozen=True)
class Precision:
    """The types that were chosen, and why."""

    compute: torch.dtype  # of the computation (autocast), and of what is exported
    weights: torch.dtype  # of the weights in memory
    reason: str

    def describe(self, stored: torch.dtype | None) -> str:
        """A line for the log; `stored` is the checkpoint's own type, None where it does not tell."""
        weights = "" if self.weights == self.compute else f", weights in {show_dtype(self.weights)}"
        rounds = stored is not None and torch.finfo(stored).eps < torch.finfo(self.weights).eps
        rounded = f"; the checkpoint's {show_dtype(stored)} weights are rounded to it" if stored and rounds else ""
        return f"Precision: {show_dtype(self.compute)}{weights} ({self.reason}{rounded})"


def choose_precision(settings: Settings, device: Device) -> Precision:
    """The types that the settings ask for, or those that fit the device.

    auto computes in
    - bfloat16 on a GPU that has it (compute capability 8.0 and above), whatever the checkpoint's type: autocast rounds
      a float32 checkpoint's numbers to it in every product anyway, and float16 would need its loss scaled;
    - float16, with the loss scaled, on an older GPU;
    - float32 on a CPU, where the short types are slower.
    The weights have the type of the computation, but full fine-tuning keeps them in float32, where small updates are
    not lost (Micikevicius et al. 2018, arXiv:1710.03740).
    Raises UserError for a type that the device cannot compute in.
    """
    has_bfloat16 = device.capability is not None and device.capability >= BFLOAT16_CAPABILITY
    if settings.model.torch_dtype != "auto":
        if settings.model.torch_dtype == "bfloat16" and device.is_gpu and not has_bfloat16:
            raise UserError(
                f"torch_dtype=bfloat16: {device} only emulates it, which takes compute capability 8.0: leave it out."
            )
        if settings.model.torch_dtype == "float16" and not device.is_gpu:
            raise UserError(
                "torch_dtype=float16: training in it needs an NVIDIA GPU and this runs on a CPU: leave it out."
            )
        compute = DTYPES[settings.model.torch_dtype]
        return Precision(compute, compute, f"torch_dtype={settings.model.torch_dtype}")
    if not device.is_gpu:
        return Precision(torch.float32, torch.float32, "auto: on a CPU")
    compute = torch.bfloat16 if has_bfloat16 else torch.float16
    weights = compute if settings.adapter.use_peft else torch.float32
    return Precision(compute, weights, f"auto: {device} has {'it' if has_bfloat16 else 'no bfloat16'}")


def find_stored_dtype(model: str, config: PreTrainedConfig) -> torch.dtype | None:
    """The type of a checkpoint's numbers: as its config says, else that of most numbers in its files."""
    stated = config.get_text_config().dtype or config.dtype
    if stated is not None:
        return stated
    sizes: Counter[torch.dtype] = Counter()
    for file in list_weights(Path(model)):
        for tensor in read_header(file).values():
            if tensor["dtype"] in STORED_DTYPES:
                sizes[STORED_DTYPES[tensor["dtype"]]] += prod(tensor["shape"])
    return max(sizes, key=lambda stored: sizes[stored], default=None)


def show_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
