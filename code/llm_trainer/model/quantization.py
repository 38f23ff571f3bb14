# SPDX-License-Identifier: Apache-2.0
"""The quantization of the base model: the one its checkpoint is stored in, or bitsandbytes' while it loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import BitsAndBytesConfig, Mxfp4Config, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.safetensors_files import count_weights, list_weights
from llm_trainer.common.units import show_bytes
from llm_trainer.config.sections import AdapterSettings, ModelSettings, ParallelismSettings
from llm_trainer.model.device import Device
from llm_trainer.model.kinds.tower import name_parts
from llm_trainer.model.parameter_roles import measure_linear_share
from llm_trainer.model.precision import show_dtype

Quantization: TypeAlias = BitsAndBytesConfig | Mxfp4Config


def build_quantization(
    config: PreTrainedConfig, settings: ModelSettings, compute_dtype: torch.dtype, device: Device
) -> Quantization | None:
    """Return how Transformers quantizes or dequantizes the base while it loads.

    None means not at all, or as the checkpoint is stored. A quantized base computes in `compute_dtype`.
    Raise UserError where bitsandbytes is needed and cannot run on the device.
    """
    stored = find_stored_method(config)
    if stored == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if device.is_here and (settings.load_in_4bit or settings.load_in_8bit or stored == "bitsandbytes"):
        try_bitsandbytes(settings, device.torch)
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_tower(quantization: Quantization | None, skeleton: PreTrainedModel) -> Quantization | None:
    """Return a quantization with the tower of an image-text model left as it is, beside what always is left."""
    parts = name_parts(skeleton)
    if parts and isinstance(quantization, BitsAndBytesConfig):
        quantization.llm_int8_skip_modules = sorted({*get_keys_to_not_convert(skeleton), *parts})
    return quantization


def find_stored_method(config: PreTrainedConfig) -> str | None:
    """Return the method that a checkpoint is stored quantized with, by Transformers' name, or None."""
    parts = (config, config.get_text_config())  # Transformers takes the second one where the first has none
    stored: Any = next((found for part in parts if (found := getattr(part, "quantization_config", None))), {})
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    if method is None and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return "bitsandbytes"  # its early checkpoints name no method
    return str(getattr(method, "value", method)) if method else None


def find_quantization_problems(
    model: str,
    config: PreTrainedConfig,
    model_settings: ModelSettings,
    adapter_settings: AdapterSettings,
    parallelism_settings: ParallelismSettings,
) -> Iterator[str]:
    """Yield a sentence for each setting that contradicts how the checkpoint is stored."""
    stored = find_stored_method(config)
    for name in ("load_in_4bit", "load_in_8bit"):
        if stored and model_settings.value(name):
            yield f"{name}=true: {model} is stored in {stored} already, and a base has one quantization: remove {name}."
    if stored and model_settings.base_compute:
        yield f"base_compute=fp8: {model} is stored in {stored}, and is for bases in 16 bit: remove base_compute."
    if model_settings.use_mxfp4 and stored != "mxfp4":
        found = f"is stored in {stored}" if stored else "is not quantized"
        yield f"use_mxfp4=true: {model} {found} and is not an MXFP4 checkpoint: remove use_mxfp4."
    if model_settings.use_mxfp4 is False and stored == "mxfp4":
        yield f"use_mxfp4=false: {model} is an MXFP4 checkpoint and can only be read as one: remove use_mxfp4."
    if stored == "bitsandbytes" and not adapter_settings.use_peft:
        yield f"use_peft=false: {model} is stored in bitsandbytes, whose weights cannot be trained: set use_peft=true."
    if stored == "bitsandbytes" and parallelism_settings.distribution == "fsdp":
        yield f"distribution=fsdp: {model} is stored in bitsandbytes, and such weights cannot be sharded: use ddp."
    if stored not in (None, "mxfp4", "bitsandbytes"):
        yield (
            f"model_id: {model} is stored in {stored}, which cannot be trained on here: give the model as it was "
            "before it was quantized, with load_in_4bit=true if it has to be small."
        )


def try_bitsandbytes(settings: ModelSettings, device: torch.device) -> None:
    """Quantize a few numbers on the device. Raise UserError where bitsandbytes cannot.

    To import the package proves nothing: it imports even where its native library cannot run.
    """
    name = "load_in_8bit" if settings.load_in_8bit else "load_in_4bit"
    try:
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

        if settings.load_in_8bit:
            int8_vectorwise_quant(torch.ones(1, 64, device=device, dtype=torch.float16))
        else:
            quantize_4bit(torch.ones(64, device=device), quant_type=settings.bnb_4bit_quant_type)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{name}=true: bitsandbytes cannot run here ({quote_error(error)}): "
            f"set {name}=false, or use the image on a GPU that bitsandbytes supports."
        ) from error


def describe_quantization(
    folder: str, skeleton: PreTrainedModel, quantization: Quantization, weights_dtype: torch.dtype
) -> str:
    """Return a line for the log: how large an MXFP4 checkpoint becomes, or the share that bitsandbytes quantizes.

    Weights that are not quantized have `weights_dtype` in memory.
    """
    if isinstance(quantization, Mxfp4Config):
        stored_bytes = sum(file.stat().st_size for file in list_weights(Path(folder)))
        loaded_bytes = count_weights(Path(folder)) * weights_dtype.itemsize
        sizes = f": {show_bytes(stored_bytes)} on disk become {show_bytes(loaded_bytes)} in memory"
        return (
            f"Quantization: the checkpoint's MXFP4 is dequantized to {show_dtype(weights_dtype)} for training"
            f"{sizes if stored_bytes else ''}"
        )
    method = "LLM.int8()" if quantization.load_in_8bit else quantization.bnb_4bit_quant_type
    double = ", its scales too" if quantization.load_in_4bit and quantization.bnb_4bit_use_double_quant else ""
    share = measure_linear_share(skeleton)
    return (
        f"Quantization: {method}{double}: {share:.0%} of the weights, as the others stay in {show_dtype(weights_dtype)}"
    )


@contextmanager
def quantize_on(device: torch.device) -> Iterator[None]:
    """Have Transformers quantize on a device what it loads in 4 bit to the CPU.

    A GPU does so many times faster, and holds one matrix at a time.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    convert_there = Bnb4bitQuantize.convert

    def convert(operation: Any, input_dict: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        matrices = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        moved = {name: matrix.to(device) for name, matrix in matrices.items()}
        return {name: weight.cpu() for name, weight in convert_there(operation, moved, **options).items()}

    Bnb4bitQuantize.convert = convert  # Transformers takes no device for it
    try:
        yield
    finally:
        Bnb4bitQuantize.convert = convert_there


def prepare_layers(model: PreTrainedModel, quantization: Quantization | None) -> PreTrainedModel:
    """Give a model without weights the layers into which Transformers would load 4-bit weights. Return the model."""
    if isinstance(quantization, BitsAndBytesConfig):
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return keep_trainable(model)


def list_packed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers whose weight bitsandbytes holds in 4 bit, or will hold."""
    for module in model.modules():
        if type(module._parameters.get("weight")).__name__ == "Params4bit":
            yield module


def build_packed_weight(data: torch.Tensor, scales: dict[str, Any], layer: nn.Module) -> nn.Parameter:
    """Return a layer's 4-bit weight from its packed numbers and from bitsandbytes' dictionary of its scales."""
    from bitsandbytes.nn import Params4bit

    return Params4bit.from_prequantized(data, scales, device=data.device, module=layer)


def keep_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Have bitsandbytes leave 4-bit weights as they are when the model is evaluated on a CPU with AVX512-BF16.

    It would put them into a form for inference, with scales in bfloat16. Training could not go on from that.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
