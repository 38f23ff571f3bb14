# SPDX-License-Identifier: Apache-2.0
"""What is decided about the model from its config alone, before data are prepared and long before weights load."""

from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig
from transformers import PreTrainedConfig

from llm_trainer.config.schema import Settings
from llm_trainer.model import loading
from llm_trainer.model.attention import AttentionChoice, choose_attention, find_faults, read_needs
from llm_trainer.model.device import Device
from llm_trainer.model.liger import LigerChoice, choose_liger, find_known_types
from llm_trainer.model.lora import build_lora_config
from llm_trainer.model.precision import Precision, find_stored_dtype
from llm_trainer.model.quantization import Quantization, build_quantization, describe_quantization
from llm_trainer.serving.limits import find_placement_refusals


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """How the model of a folder is loaded and computed."""

    folder: str
    config: PreTrainedConfig
    device: Device
    precision: Precision
    quantization: Quantization | None
    attention: AttentionChoice
    liger: LigerChoice
    lora: LoraConfig | None
    reasons: tuple[str, ...]  # a line for the log each


def plan_model(folder: str, settings: Settings, device: Device, precision: Precision) -> ModelPlan:
    """Raises UserError for what the settings ask of this model and cannot be."""
    config = loading.read_config(folder, settings)
    quantization = build_quantization(folder, config, settings, precision.compute, device)
    skeleton = loading.build_skeleton(folder, config, settings)
    attention = choose_attention(read_needs(skeleton), settings, precision.compute, device, find_faults(device))
    liger = choose_liger(config, settings, device, find_known_types(device))
    lora = build_lora_config(settings, skeleton) if settings.adapter.use_peft else None

    def reasons() -> Iterator[str]:
        yield precision.describe(find_stored_dtype(folder, config))
        if quantization is not None:
            yield describe_quantization(folder, skeleton, quantization, precision.weights)
        yield str(attention)
        yield str(liger)
        if lora is not None and not settings.output.merge_weights:
            misplacements = find_placement_refusals(lora, config.get_text_config().model_type)
            yield from (f"Warning: {text}" for text in misplacements)

    return ModelPlan(
        folder=folder,
        config=config,
        device=device,
        precision=precision,
        quantization=quantization,
        attention=attention,
        liger=liger,
        lora=lora,
        reasons=tuple(reasons()),
    )
