# SPDX-License-Identifier: Apache-2.0
"""A model's size from its config alone: what it is made of, what of it is trained, and a skeleton to try a step on.

Transformers and PEFT themselves build the model and its adapters, on the meta device, so that what is counted is what
training will have. No weights are read, and bitsandbytes need not be there: what it makes of a matrix is known.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from llm_trainer.common.errors import quote_error
from llm_trainer.config.schema import Settings
from llm_trainer.model import lora
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.quantization import find_stored_method

Quantization = Literal["nf4", "fp4", "int8"]
Role = Literal["linear", "experts", "embeddings", "output", "other", "adapter"]
BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # weights that share a scale, and scales that share one, in bitsandbytes


class UnknownShapeError(Exception):
    """The memory of this model cannot be told from its config; that says nothing about whether it can be trained."""


@dataclass(frozen=True)
class Part:
    """Some of the weights, as they lie in memory."""

    role: Role  # `linear`: what bitsandbytes quantizes; `experts`: fused ones, which it does not
    layer: int | None
    num_weights: int
    data_bytes: int
    scales_bytes: int  # of quantized weights; not sharded with them
    trained_bytes: int
    factored_bytes: int  # a float32 number for each row and column of what is trained


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What a model is made of before anything of it is loaded."""

    parts: tuple[Part, ...]  # a parameter each; a tied one comes once
    quantization: Quantization | None
    weights_dtype: torch.dtype
    is_mxfp4: bool  # as it is stored; it is trained dequantized
    skeleton: PreTrainedModel | PeftModel  # on the meta device: first and last layer, and one of each kind between
    layers_name: str  # of the skeleton's list of layers
    kinds: tuple[int, ...]  # for each layer of the model the one of the skeleton that is like it

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    def count_weights(self, *roles: Role) -> int:
        return sum(part.num_weights for part in self.parts if part.role in roles or not roles)

    def count_bytes(self, *roles: Role) -> int:
        return sum(part.data_bytes + part.scales_bytes for part in self.parts if part.role in roles or not roles)

    @property
    def num_trained(self) -> int:
        return sum(part.num_weights for part in self.parts if part.trained_bytes)

    @property
    def trained_bytes(self) -> int:
        return sum(part.trained_bytes for part in self.parts)

    def list_layers(self) -> list[list[Part]]:
        """The parts of each layer."""
        layers: list[list[Part]] = [[] for _ in self.kinds]
        for part in self.parts:
            if part.layer is not None:
                layers[part.layer].append(part)
        return layers


def read_shape(config: PreTrainedConfig, settings: Settings, weights_dtype: torch.dtype) -> ModelShape:
    """The shape of the model of this config, with the adapter and the quantization that the settings ask for.

    Raises UnknownShapeError where Transformers or PEFT cannot build that without weights.
    """
    quantization = choose_quantization(settings)
    try:
        base = build_on_meta(copy.deepcopy(config), settings, weights_dtype)
        roles = dict(assign_roles(base))
        for name in roles if quantization else ():
            if roles[name] == "linear":
                base.get_submodule(name.removesuffix(".weight")).quantization = quantization
        model = add_adapter(base, settings) if settings.adapter.use_peft else base
    except (ValueError, ImportError, AttributeError, NotImplementedError) as error:
        raise UnknownShapeError(f"it cannot be built from its config: {quote_error(error)}") from error
    text_config = base.config.get_text_config()
    layers_name = find_layer_list(model, text_config.num_hidden_layers)
    parts = tuple(list_parts(model, roles, layers_name, quantization, settings))
    return ModelShape(
        parts=parts,
        quantization=quantization,
        weights_dtype=weights_dtype,
        is_mxfp4=find_stored_method(config) == "mxfp4",
        skeleton=model,
        layers_name=layers_name,
        kinds=prune_layers(model, layers_name, text_config),
    )


def choose_quantization(settings: Settings) -> Quantization | None:
    if settings.model.load_in_4bit:
        return settings.model.bnb_4bit_quant_type
    return "int8" if settings.model.load_in_8bit else None


def assign_roles(base: PreTrainedModel) -> Iterator[tuple[str, Role]]:
    """Each parameter's name, and what it is for."""
    kept = [*get_keys_to_not_convert(base), *(base._keep_in_fp32_modules or ())]  # as Transformers' quantizers have it
    output = base.get_output_embeddings()
    for name, parameter in base.named_parameters():
        path, _, own = name.rpartition(".")
        module = base.get_submodule(path)
        if isinstance(module, nn.Embedding):
            yield name, "embeddings"
        elif module is output:
            yield name, "output"
        elif type(module) is nn.Linear and own == "weight" and should_convert_module(path, kept):
            yield name, "linear"
        else:
            yield name, "experts" if parameter.dim() == 3 else "other"


def add_adapter(base: PreTrainedModel, settings: Settings) -> PeftModel:
    config = lora.build_lora_config(settings, base)
    config.init_lora_weights = True  # others look at the weights, and have as many numbers
    with torch.device("meta"):
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT keeps adapters in float32
            parameter.data = parameter.data.float()
    return model


def find_layer_list(model: nn.Module, num_layers: int) -> str:
    """The name of the list of decoder layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise UnknownShapeError(f"it has no list of the {num_layers} layers that its config speaks of")


def list_parts(
    model: nn.Module,
    roles: dict[str, Role],
    layers_name: str,
    quantization: Quantization | None,
    settings: Settings,
) -> Iterator[Part]:
    for name, parameter in model.named_parameters():
        role = roles.get(name.removeprefix("base_model.model.").replace(".base_layer", ""), "adapter")
        data_bytes, scales_bytes = parameter.nbytes, 0
        if quantization and role == "linear":
            data_bytes, scales_bytes = count_quantized_bytes(
                parameter, quantization, settings.model.bnb_4bit_use_double_quant
            )
        below = name.removeprefix(f"{layers_name}.")
        *rows, columns = parameter.shape or (1,)
        yield Part(
            role=role,
            layer=int(below.partition(".")[0]) if below != name else None,
            num_weights=parameter.numel(),
            data_bytes=data_bytes,
            scales_bytes=scales_bytes,
            trained_bytes=parameter.nbytes if parameter.requires_grad else 0,
            factored_bytes=4 * (math.prod(rows) + columns) if parameter.requires_grad else 0,
        )


def count_quantized_bytes(weight: nn.Parameter, quantization: Quantization, is_nested: bool) -> tuple[int, int]:
    """What bitsandbytes makes of a matrix: its numbers, and their scales.

    8 bit: a float32 scale a row (Dettmers et al. 2022, arXiv:2208.07339). 4 bit: a float32 scale a block of 64, or,
    double quantized, a byte, and a float32 scale for 256 of these (Dettmers et al. 2023, arXiv:2305.14314).
    """
    number = weight.numel()
    if quantization == "int8":
        return number, 4 * weight.shape[0]
    blocks = math.ceil(number / BLOCK_SIZE)
    scales_bytes = blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) if is_nested else 4 * blocks
    return math.ceil(number / 2), scales_bytes


def prune_layers(model: nn.Module, layers_name: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """Leave the first and the last layer, whose neighbours hold other things, and of those between one of each kind.

    Returns which of those each layer was like.
    """
    layers = model.get_submodule(layers_name)
    types = getattr(config, "layer_types", None)
    kept: dict[Any, int] = {"first": 0}
    kinds: list[Any] = ["first"]
    for number in range(1, len(layers)):
        parameters = ((name, tuple(each.shape), each.dtype) for name, each in layers[number].named_parameters())
        kind = "last" if number == len(layers) - 1 else (types[number] if types else None, *parameters)
        kept.setdefault(kind, number)
        kinds.append(kind)
    parent, _, own = layers_name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.ModuleList(layers[number] for number in kept.values()))
    config.num_hidden_layers = len(kept)
    if types:
        config.layer_types = [types[number] for number in kept.values()]
    return tuple(list(kept).index(kind) for kind in kinds)
