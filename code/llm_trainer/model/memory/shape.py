# SPDX-License-Identifier: Apache-2.0
"""A model's shape from its config alone: its parts, how many of their weights are trained, and a skeleton.

Transformers and PEFT themselves build the model and its adapters on the meta device. What is counted is therefore what
training will have. No weights are read, and bitsandbytes need not be installed: the size of its matrices is known.
"""

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_trainer.common.errors import quote_error
from llm_trainer.config.sections import AdapterSettings, ModelSettings
from llm_trainer.model import lora
from llm_trainer.model.kinds.text_pass import find_token_types, give_token_types
from llm_trainer.model.kinds.tower import freeze_tower, list_tower
from llm_trainer.model.layers.fused_adapters import fuse_adapters
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.parameter_roles import Role, assign_roles
from llm_trainer.model.precision import set_adapter_types
from llm_trainer.model.quantization import find_stored_method

Quantization = Literal["nf4", "fp4", "int8", "fp8"]
# In bitsandbytes, the number of weights that share a scale, and of scales that share a scale of their own.
BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256


class UnknownShapeError(Exception):
    """The memory of this model is not known from its config. Nothing follows for whether it can be trained."""


@dataclass(frozen=True)
class Part:
    """A parameter of the model, as it lies in memory."""

    role: Role
    layer: int | None  # index of its decoder layer; None for one outside the layers
    num_weights: int
    rows: int  # the size of its first dimension, along which FSDP2 cuts it
    data_bytes: int
    scales_bytes: int  # of a quantized parameter; FSDP does not shard them
    trained_bytes: int  # 0 for a frozen one
    factored_bytes: int  # a float32 number for each row and column of a trained one, as Adafactor keeps

    def count_padded_weights(self, shards: int) -> int:
        """Return the number of weights that FSDP2 moves: all shards are as large as the first, and some are padding."""
        return self.num_weights // self.rows * shards * math.ceil(self.rows / shards)


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model's parts and a skeleton of it, before any of its weights is loaded."""

    parts: tuple[Part, ...]  # one for each parameter; a tied one comes once
    quantization: Quantization | None
    weights_dtype: torch.dtype
    is_mxfp4: bool  # as it is stored; it is trained dequantized
    skeleton: PreTrainedModel | PeftModel  # on the meta device, with one layer of each kind
    layers_name: str  # name of the skeleton's list of layers
    kinds: tuple[int, ...]  # for each layer of the model, the index of the skeleton's layer that is like it

    @property
    def num_layers(self) -> int:
        """The number of the model's decoder layers."""
        return len(self.kinds)

    @property
    def can_recompute_some(self) -> bool:
        """True where each layer can be told by itself to recompute its activations."""
        layers = self.skeleton.get_submodule(self.layers_name)
        return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)

    def count_weights(self, *roles: Role) -> int:
        """Return the number of weights in parts of these roles, or in all parts."""
        return sum(part.num_weights for part in self.parts if part.role in roles or not roles)

    def count_bytes(self, *roles: Role) -> int:
        """Return the bytes that parts of these roles take in memory, scales included, or all parts."""
        return sum(part.data_bytes + part.scales_bytes for part in self.parts if part.role in roles or not roles)

    @functools.cached_property
    def alike_parts(self) -> Counter[tuple[Role, int, int]]:
        """The number of parts with the same role, data bytes and bytes of scales."""
        return Counter((part.role, part.data_bytes, part.scales_bytes) for part in self.parts)

    @functools.cached_property
    def num_trained(self) -> int:
        """The number of trained weights."""
        return sum(part.num_weights for part in self.parts if part.trained_bytes)

    @functools.cached_property
    def trained_bytes(self) -> int:
        """The bytes of trained weights."""
        return sum(part.trained_bytes for part in self.parts)

    def list_tower_blocks(self) -> list[int]:
        """Return the number of weights of each block of the tower, which FSDP2 gathers by itself."""
        base = lora.find_base_model(self.skeleton)
        tower = {base.get_parameter(name) for name in list_tower(base)}
        blocks = (module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))
        weights = ([*block.parameters()] for block in blocks)
        return [sum(each.numel() for each in own) for own in weights if own and tower.issuperset(own)]

    def list_layers(self) -> list[list[Part]]:
        """Return the parts of each layer, in the order of the layers."""
        layers: list[list[Part]] = [[] for _ in self.kinds]
        for part in self.parts:
            if part.layer is not None:
                layers[part.layer].append(part)
        return layers


def count_cache_bytes(config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of so many tokens, in all layers.

    Layers that keep only a window of them, or a state in their place, take less.
    """
    numbers = 0
    for layer in list_layer_configs(config.get_text_config()):
        num_heads, width = read_heads(layer)
        numbers += 2 * (getattr(layer, "num_key_value_heads", None) or num_heads) * width
    return numbers * num_tokens * dtype.itemsize


def list_layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the config of each layer of a decoder. They differ in Gemma 4, whose own tells no size of a head."""
    return [*config.per_layer_config] if config.is_heterogeneous else [config] * config.num_hidden_layers


def read_heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of a layer's heads and the size of one; zeros for one without attention, such as Mamba's."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    return num_heads, (getattr(config, "head_dim", None) or config.hidden_size // num_heads) if num_heads else 0


def read_shape(
    config: PreTrainedConfig,
    model_settings: ModelSettings,
    adapter_settings: AdapterSettings,
    weights_dtype: torch.dtype,
) -> ModelShape:
    """Return the model's shape, with the adapter and the quantization of the settings. Raise UnknownShapeError."""
    quantization = choose_quantization(model_settings)
    try:
        base = build_base(config, weights_dtype, model_settings.trust_remote_code, adapter_settings.train_vision)
        roles = dict(assign_roles(base))
        mark_quantized(base, roles, quantization)
        model: PreTrainedModel | PeftModel = base
        if adapter_settings.use_peft:
            model = add_adapter(base, lora.build_lora_config(model_settings, adapter_settings, base))
            if quantization != "int8":  # whose layers PEFT computes
                fuse_adapters(model)
    except (ValueError, ImportError, AttributeError, NotImplementedError) as error:
        raise UnknownShapeError(f"it cannot be built from its config: {quote_error(error)}") from error
    text_config = base.config.get_text_config()
    layers_name = find_layer_list(model, text_config.num_hidden_layers)
    return ModelShape(
        parts=tuple(list_parts(model, layers_name, roles, quantization, model_settings.bnb_4bit_use_double_quant)),
        quantization=quantization,
        weights_dtype=weights_dtype,
        is_mxfp4=find_stored_method(config) == "mxfp4",
        skeleton=model,
        layers_name=layers_name,
        kinds=prune_layers(model, layers_name, text_config),
    )


def build_base(
    config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool, train_vision: bool
) -> PreTrainedModel:
    """Return the model of a config as a training has it, on the meta device. The config stays as it is."""
    base = build_on_meta(copy.deepcopy(config), dtype, trust_remote_code)
    give_token_types(base, find_token_types(base))
    if not train_vision:
        freeze_tower(base)
    return base


def mark_quantized(base: PreTrainedModel, roles: dict[str, Role], quantization: Quantization | None) -> None:
    """Mark the layers that are quantized. step_trace reads the mark, which lasts through PEFT and copies."""
    for name, role in roles.items() if quantization else ():
        if role == "linear":
            base.get_submodule(name.removesuffix(".weight")).quantization = quantization


def choose_quantization(settings: ModelSettings) -> Quantization | None:
    """Return the quantization that bitsandbytes is asked for, fp8 where the base multiplies in float8, or None."""
    if settings.base_compute:
        return settings.base_compute
    if settings.load_in_4bit:
        return settings.bnb_4bit_quant_type
    return "int8" if settings.load_in_8bit else None


def add_adapter(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return the model on the meta device with an adapter in float32, as PEFT keeps one."""
    config.init_lora_weights = True  # other ways to begin read the weights, and give as many numbers
    with torch.device("meta"):
        model = get_peft_model(base, config)
    set_adapter_types(model)
    return model


def find_layer_list(model: PreTrainedModel | PeftModel, num_layers: int) -> str:
    """Return the name of the list of decoder layers. Raise UnknownShapeError where there is none of that length.

    A tower may have as many layers as the decoder, and come before it.
    """
    decoder = {*model.get_decoder().modules()}
    for name, module in model.named_modules():
        if module in decoder and isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise UnknownShapeError(f"it has no list of the {num_layers} layers that its config speaks of")


def list_parts(
    model: nn.Module, layers_name: str, roles: dict[str, Role], quantization: Quantization | None, is_nested: bool
) -> Iterator[Part]:
    """Yield the model's parameters as parts. `roles` are the base's, by the names that it has without an adapter."""
    for name, parameter in model.named_parameters():
        role = roles.get(name.removeprefix("base_model.model.").replace(".base_layer", ""), "adapter")
        data_bytes, scales_bytes = parameter.nbytes, 0
        if quantization and role == "linear":
            data_bytes, scales_bytes = count_quantized_bytes(parameter, quantization, is_nested)
        below = name.removeprefix(f"{layers_name}.")
        *rows, columns = parameter.shape or (1,)
        yield Part(
            role=role,
            layer=int(below.partition(".")[0]) if below != name else None,
            num_weights=parameter.numel(),
            rows=parameter.shape[0] if parameter.shape else 1,
            data_bytes=data_bytes,
            scales_bytes=scales_bytes,
            trained_bytes=parameter.nbytes if parameter.requires_grad else 0,
            factored_bytes=4 * (math.prod(rows) + columns) if parameter.requires_grad else 0,
        )


def count_quantized_bytes(weight: nn.Parameter, quantization: Quantization, is_nested: bool) -> tuple[int, int]:
    """Return the bytes of a matrix (rows, columns) that is quantized, and the bytes of its scales.

    - float8: two copies of a byte a weight, and a float32 scale for each row and each column.
    - 8 bit: a float32 scale for each row (Dettmers et al. 2022, arXiv:2208.07339).
    - 4 bit: a float32 scale for each block of 64 weights. Nested ("double quantized"), a scale takes a byte, and each
      256 of them share a float32 scale (Dettmers et al. 2023, arXiv:2305.14314).
    """
    num_weights = weight.numel()
    if quantization == "fp8":
        return 2 * num_weights, 4 * sum(weight.shape)
    if quantization == "int8":
        return num_weights, 4 * weight.shape[0]
    num_blocks = math.ceil(num_weights / BLOCK_SIZE)
    scales_bytes = num_blocks + 4 * math.ceil(num_blocks / NESTED_BLOCK_SIZE) if is_nested else 4 * num_blocks
    return math.ceil(num_weights / 2), scales_bytes


def prune_layers(model: nn.Module, layers_name: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """Leave the first and the last layer of a model, and one of each kind between them.

    The neighbours of the first and the last one hold other things, so that these two are kinds of their own.
    Return, for each layer of the model before, the index of the remaining layer that is like it. `config` changes too.
    """
    layers = model.get_submodule(layers_name)
    types = getattr(config, "layer_types", None)
    kept: dict[Any, int] = {"first": 0}  # kind -> index of its first layer
    kinds: list[Any] = ["first"]
    for index in range(1, len(layers)):
        parameters = ((name, tuple(each.shape), each.dtype) for name, each in layers[index].named_parameters())
        kind = "last" if index == len(layers) - 1 else (types[index] if types else None, *parameters)
        kept.setdefault(kind, index)
        kinds.append(kind)
    try:
        config.num_hidden_layers = len(kept)
        if types:
            config.layer_types = [types[index] for index in kept.values()]
    except (AttributeError, NotImplementedError):  # where these follow from other numbers, all layers are kept
        return tuple(range(len(layers)))
    parent, _, own = layers_name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.ModuleList(layers[index] for index in kept.values()))
    return tuple(list(kept).index(kind) for kind in kinds)
