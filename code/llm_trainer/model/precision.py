# SPDX-License-Identifier: Apache-2.0
"""The number types of a job: the type that it computes in, and the type of its weights in memory."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from transformers import PreTrainedConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import list_weights, read_header
from llm_trainer.config.sections import AdapterSettings, ModelSettings, TrainingSettings
from llm_trainer.model.device import Device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by their safetensors codes
# Ampere's. On an older GPU PyTorch emulates bfloat16, and says that it is supported: Transformers refuses TF32 alone.
BFLOAT16_CAPABILITY = (8, 0)
AMPERE_ARGUMENTS = {"bf16": "bfloat16", "bf16_full_eval": "bfloat16", "tf32": "TF32"}  # of the trainer


@dataclass(frozen=True)
class Precision:
    """The number types that were chosen, and the reason in words."""

    compute: torch.dtype  # autocast computes in it, and the export is written in it
    weights: torch.dtype
    reason: str

    def describe(self, stored: torch.dtype | None) -> str:
        """Return a line for the log. `stored` is the checkpoint's own type, or None where it is not known."""
        weights = "" if self.weights == self.compute else f", weights in {show_dtype(self.weights)}"
        rounds = stored is not None and torch.finfo(stored).eps < torch.finfo(self.weights).eps
        rounded = f"; the checkpoint's {show_dtype(stored)} weights are rounded to it" if stored and rounds else ""
        return f"Precision: {show_dtype(self.compute)}{weights} ({self.reason}{rounded})"


def choose_precision(model_settings: ModelSettings, adapter_settings: AdapterSettings, device: Device) -> Precision:
    """Return the types that `torch_dtype` asks for. For `auto`, choose by the device:

    - bfloat16 on a GPU of compute capability 8.0 and above, whatever the checkpoint's type. Autocast rounds a float32
      checkpoint's numbers in every product anyway, and float16 would need its loss scaled.
    - float16, with the loss scaled, on an older GPU.
    - float32 on a CPU, where the short types are slower.

    The weights have the type of the computation. Full fine-tuning keeps them in float32, where small updates are not
    lost (Micikevicius et al. 2018, arXiv:1710.03740). Raise UserError for a type that the device cannot compute in.
    """
    if model_settings.torch_dtype != "auto":
        check_dtype(model_settings.torch_dtype, device)
        compute = DTYPES[model_settings.torch_dtype]
        return Precision(compute, compute, f"torch_dtype={model_settings.torch_dtype}")
    if not device.is_gpu:
        return Precision(torch.float32, torch.float32, "auto: on a CPU")
    compute = torch.bfloat16 if has_bfloat16(device) else torch.float16
    weights = compute if adapter_settings.use_peft else torch.float32
    return Precision(compute, weights, f"auto: {device} has {'it' if has_bfloat16(device) else 'no bfloat16'}")


def has_bfloat16(device: Device) -> bool:
    """Tell whether a GPU computes in bfloat16 by itself, without emulation."""
    return device.capability is not None and device.capability >= BFLOAT16_CAPABILITY


def check_dtype(name: str, device: Device) -> None:
    """Raise UserError where the device cannot compute in the type that `torch_dtype` names."""
    if name == "bfloat16" and device.is_gpu and not has_bfloat16(device):
        raise UserError(
            f"torch_dtype=bfloat16: {device} only emulates it, which takes compute capability 8.0: leave it out."
        )
    if name == "float16" and not device.is_gpu:
        raise UserError("torch_dtype=float16: training in it needs an NVIDIA GPU and this runs on a CPU: leave it out.")


def check_arguments(training: TrainingSettings, device: Device) -> None:
    """Raise UserError where the trainer is told to compute in a type that a GPU lacks."""
    is_old = device.is_gpu and not has_bfloat16(device)
    problems = [
        f"{name}=true: {device} has no {kind}, which takes compute capability 8.0: leave it out."
        for name, kind in AMPERE_ARGUMENTS.items()
        if is_old and training.is_given(name) and training.value(name)
    ]
    if problems:
        raise UserError(*problems)


def find_stored_dtype(folder: str, config: PreTrainedConfig) -> torch.dtype | None:
    """Return the type of a checkpoint's numbers: the one its config states, or else the type of most weights."""
    stated = config.get_text_config().dtype or config.dtype
    if stated is not None:
        return stated
    num_weights: Counter[torch.dtype] = Counter()
    for file in list_weights(Path(folder)):
        for tensor in read_header(file).values():
            if tensor["dtype"] in STORED_DTYPES:
                num_weights[STORED_DTYPES[tensor["dtype"]]] += prod(tensor["shape"])
    return max(num_weights, key=lambda dtype: num_weights[dtype], default=None)


def show_dtype(dtype: torch.dtype) -> str:
    """Return a type's name as a user writes it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def set_adapter_types(model: PeftModel) -> PeftModel:
    """Have an adapter keep its weights in float32, and compute in the type of autocast. Return the model."""
    keep_adapter_in_float32(model)
    leave_casts_to_autocast(model)
    return model


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Undo TRL's rounding of a quantized model's adapter to bfloat16.

    An adapter takes a few MB, small updates are lost in bfloat16, and loss scaling (float16) refuses its gradients.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def leave_casts_to_autocast(model: PeftModel) -> None:
    """Have the adapter's linear layers cast their input only where autocast does not.

    PEFT casts it to float32, the type of the adapter's weights, and autocast rounds it back for the product. Both
    copies would wait beside the input for the backward pass.

    The cast stays where results depend on it. Dropout draws and scales other numbers in 16 bit. DoRA takes the base's
    weights in the type of the input. The layers of bitsandbytes have no cast under a GPU's autocast.
    """
    for layer in model.modules():
        if isinstance(layer, Linear) and not layer.lora_variant and has_no_dropout(layer):
            layer._cast_input_dtype = cast_without_autocast


def has_no_dropout(layer: Linear) -> bool:
    """Tell whether the layer's adapters take their input as it is."""
    return all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def cast_without_autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the input of a layer for weights of `dtype`.

    Autocast is asked at each call. A layer that is computed again in the backward pass has it as before, and the proof
    of an export runs without it.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)
