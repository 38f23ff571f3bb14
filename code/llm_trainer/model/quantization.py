# SPDX-License-Identifier: Apache-2.0
"""How the base model is quantized: as its checkpoint is stored, or by bitsandbytes while it loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, Mxfp4Config, PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.safetensors_files import count_weights, list_weights
from llm_trainer.common.units import show_bytes
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.precision import show_dtype

Quantization: TypeAlias = BitsAndBytesConfig | Mxfp4Config


def build_quantization(
    model: str, config: PreTrainedConfig, settings: Settings, dtype: torch.dtype, device: Device
) -> Quantization | None:
    """How the base is quantized while it loads; None: not at all, or as it is stored. Computed in `dtype`.

    Raises UserError where that cannot work, before anything is loaded.
    """
    if problems := list(find_quantization_problems(model, config, settings)):
        raise UserError(*problems)
    stored = find_stored_method(config)
    if stored == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if settings.model.load_in_4bit or settings.model.load_in_8bit or stored == "bitsandbytes":
        try_bitsandbytes(settings, device.torch)
    if settings.model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.model.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def find_stored_method(config: PreTrainedConfig) -> str | None:
    """The method that a checkpoint was quantized with before it was stored, in Transformers' word for it."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    if method is None and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return "bitsandbytes"  # early checkpoints of it do not tell
    return str(getattr(method, "value", method)) if method else None


def find_quantization_problems(model: str, config: PreTrainedConfig, settings: Settings) -> Iterator[str]:
    """Sentences about settings that contradict how the checkpoint is stored."""
    stored = find_stored_method(config)
    for name in ("load_in_4bit", "load_in_8bit"):
        if stored and settings.value(name):
            yield f"{name}=true: {model} is stored in {stored} already, and a base has one quantization: remove {name}."
    if settings.model.use_mxfp4 and stored != "mxfp4":
        found = f"is stored in {stored}" if stored else "is not quantized"
        yield f"use_mxfp4=true: {model} {found} and is not an MXFP4 checkpoint: remove use_mxfp4."
    if settings.model.use_mxfp4 is False and stored == "mxfp4":
        yield f"use_mxfp4=false: {model} is an MXFP4 checkpoint and can only be read as one: remove use_mxfp4."
    if stored == "bitsandbytes" and not settings.adapter.use_peft:
        yield f"use_peft=false: {model} is stored in bitsandbytes, whose weights cannot be trained: set use_peft=true."
    if stored == "bitsandbytes" and settings.parallelism.distribution == "fsdp":
        yield f"distribution=fsdp: {model} is stored in bitsandbytes, and such weights cannot be sharded: use ddp."
    if stored not in (None, "mxfp4", "bitsandbytes"):
        yield (
            f"model_id: {model} is stored in {stored}, which cannot be trained on here: give the model as it was "
            "before it was quantized, with load_in_4bit=true if it has to be small."
        )


def try_bitsandbytes(settings: Settings, device: torch.device) -> None:
    """Quantize a few numbers: the package imports even where its native library cannot run."""
    name = "load_in_8bit" if settings.model.load_in_8bit else "load_in_4bit"
    try:
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

        if settings.model.load_in_8bit:
            int8_vectorwise_quant(torch.ones(1, 64, device=device, dtype=torch.float16))
        else:
            quantize_4bit(torch.ones(64, device=device), quant_type=settings.model.bnb_4bit_quant_type)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{name}=true: bitsandbytes cannot run here ({quote_error(error)}): "
            f"set {name}=false, or use the image on a GPU that bitsandbytes supports."
        ) from error


def describe_quantization(folder: str, model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> str:
    """A line for the log: what an MXFP4 checkpoint grows to, or what of the model bitsandbytes quantizes."""
    if isinstance(quantization, Mxfp4Config):
        stored = sum(file.stat().st_size for file in list_weights(Path(folder)))
        whole = count_weights(Path(folder)) * dtype.itemsize
        sizes = f": {show_bytes(stored)} on disk become {show_bytes(whole)} in memory" if stored else ""
        return f"Quantization: the checkpoint's MXFP4 is dequantized to {show_dtype(dtype)} for training{sizes}"
    method = "LLM.int8()" if quantization.load_in_8bit else quantization.bnb_4bit_quant_type
    double = ", its scales too" if quantization.load_in_4bit and quantization.bnb_4bit_use_double_quant else ""
    share = measure_linear_share(model)
    return f"Quantization: {method}{double}: {share:.0%} of the weights, as the others stay in {show_dtype(dtype)}"


def keep_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Have bitsandbytes leave 4-bit weights as they are when the model is evaluated on a CPU with AVX512-BF16.

    It would put them into a form for inference, with scales in bfloat16, in which training does not go on as it began.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def measure_linear_share(model: PreTrainedModel) -> float:
    """The share of the weights that bitsandbytes quantizes: linear layers' but the output's, and no fused experts'."""
    linear = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
    linear -= {module.weight for module in (model.get_output_embeddings(),) if module is not None}
    return sum(weight.numel() for weight in linear) / model.num_parameters()


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Undo TRL's rounding of a quantized model's adapter to bfloat16.

    An adapter is a few MB, small updates are lost in bfloat16, and loss scaling (float16) refuses its gradients.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
