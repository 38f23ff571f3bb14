# SPDX-License-Identifier: Apache-2.0
"""The deltas that a LoRA adapter adds to a model's parameters, read from PEFT's layers on the model's skeleton.

A delta is a product of two thin matrices (Hu et al. 2021, arXiv:2106.09685), and any of its rows can be computed apart.
DoRA (Liu et al. 2024, arXiv:2402.09353) has no such delta: PEFT's own layer merges it with the whole matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from peft.utils import TrainableTokensWrapper
from torch import nn

from llm_trainer.common.errors import UserError
from llm_trainer.merge.weight_layout import WeightLayout
from llm_trainer.model.lora_init import ADAPTER

MERGED_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")


class WeightDelta(Protocol):
    """Numbers that are added to a parameter, or to a tensor of the checkpoint."""

    @property
    def is_whole(self) -> bool:
        """True where rows cannot be changed apart from the others."""

    def add_to(self, weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the float32 rows `first` to before `last` with the delta. It may be added in place."""


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """A product: scale * left @ right."""

    left: torch.Tensor  # ([experts,] rows, rank), float32
    right: torch.Tensor  # ([experts,] rank, columns), float32
    scale: float
    is_whole: bool = False

    def add_to(self, weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the rows with their part of the product."""
        if self.left.ndim == 2:
            return weight.addmm_(self.left[first:last], self.right, alpha=self.scale)
        return weight.baddbmm_(self.left[first:last], self.right[first:last], alpha=self.scale)

    def equals(self, other: WeightDelta) -> bool:
        """Tell whether the other is the same, as it is where tied weights share one adapter."""
        return (
            isinstance(other, LowRankDelta)
            and self.scale == other.scale
            and torch.equal(self.left, other.left)
            and torch.equal(self.right, other.right)
        )


@dataclass(frozen=True, eq=False)
class BiasDelta:
    """A vector that is added to a bias."""

    vector: torch.Tensor
    is_whole: bool = False

    def add_to(self, weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the numbers with their part of the vector."""
        return weight.add_(self.vector[first:last])


@dataclass(frozen=True, eq=False)
class PeftMerge:
    """The merge of a whole matrix by PEFT's own layer."""

    layer: LoraLayer
    is_whole: bool = True

    def add_to(self, weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the merged matrix. `first` and `last` are those of the whole."""
        base_layer = self.layer.get_base_layer()
        placeholder = base_layer.weight
        base_layer.weight = nn.Parameter(weight, requires_grad=False)
        self.layer.merge()
        merged = base_layer.weight.data
        base_layer.weight = placeholder
        self.layer.merged_adapters.clear()
        return merged


@dataclass(frozen=True, eq=False)
class ConvertedDelta:
    """The deltas of a group of parameters on one of the tensors that the group is made of."""

    layout: WeightLayout
    deltas: dict[str, LowRankDelta | None]  # of the parameters that are converted together
    name: str  # of the tensor
    index: int | None = None  # of the row (an expert) of the parameters that the tensor alone is
    is_whole: bool = True

    def add_to(self, weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return the rows with the deltas, converted to this tensor's layout."""
        name = self.name
        if self.index is not None:
            name = self.layout.places[name][0]
            first, last = self.index, self.index + 1
        parameters = {each: self.layout.skeleton.get_parameter(each) for each in self.deltas}
        values = {}
        for each, delta in self.deltas.items():
            end = len(parameters[each]) if self.is_whole and self.index is None else last
            rows = torch.zeros_like(parameters[each][first:end], dtype=torch.float32, device="cpu")
            values[each] = delta.add_to(rows, first, end) if delta else rows
        return weight.add_(self.layout.revert(values)[name])


def list_replaced(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the parameters that the adapter replaces, by name: trained biases, and those of `modules_to_save`."""
    replaced = {}
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        path, is_saved, own = name.rpartition(f".modules_to_save.{ADAPTER}")
        is_adapter = ".lora_" in name or ".original_module." in name
        if is_saved:
            replaced[f"{path}{own}"] = parameter.data
        elif not is_adapter and not is_placeholder(parameter):
            replaced[name.replace(".base_layer.", ".")] = parameter.data
    return replaced


def is_placeholder(parameter: torch.Tensor) -> bool:
    """Tell whether a parameter is one number that only looks like a tensor."""
    return not any(parameter.stride())


def list_deltas(model: PeftModel) -> Iterator[tuple[str, WeightDelta]]:
    """Yield each delta with the name of its parameter in the base. Raise UserError for one that cannot be merged."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, TrainableTokensWrapper):
            raise UserError(f"The adapter trains single tokens of {name}, which cannot be merged here: use PEFT.")
        if isinstance(module, LoraLayer):
            path = name
            while path.endswith(".base_layer"):  # adapters on several parameters of a module are wrapped in each other
                path = path.removesuffix(".base_layer")
            own = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            yield f"{path}.{own}", read_delta(path, module)
            if module.lora_bias.get(ADAPTER):
                if module.get_base_layer().bias is None:
                    raise UserError(
                        f"The adapter has a bias on {path}, which has none in the base: it cannot be merged."
                    )
                yield f"{path}.bias", BiasDelta(module.lora_B[ADAPTER].bias.data * module.scaling[ADAPTER])
                module.lora_bias[ADAPTER] = False  # PEFT's layer must not add it again to the placeholder


def read_delta(name: str, layer: LoraLayer) -> WeightDelta:
    """Return the delta of a layer's adapter. `name` is the layer's. Raise UserError for one that cannot be merged."""
    variant = layer.lora_variant.get(ADAPTER)
    if variant is not None:
        kind = getattr(variant, "__name__", type(variant).__name__)
        if kind not in MERGED_VARIANTS:
            raise UserError(f"The adapter on {name} is of PEFT's {kind}, which cannot be merged here: use PEFT.")
        return PeftMerge(layer)
    scale = layer.scaling[ADAPTER]
    if isinstance(layer, ParamWrapper):
        if layer.get_param().ndim == 3:
            left, right, scale = layer.get_delta_factors(ADAPTER)
            return LowRankDelta(left.data, right.data, scale)
        return LowRankDelta(layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data, scale)
    if isinstance(layer, Linear):
        left, right = layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data
        return LowRankDelta(right.T, left.T, scale) if layer.fan_in_fan_out else LowRankDelta(left, right, scale)
    if isinstance(layer, Embedding):
        left, right = layer.lora_embedding_A[ADAPTER].data.T, layer.lora_embedding_B[ADAPTER].data.T
        return LowRankDelta(left, right, scale)
    if hasattr(layer.get_base_layer(), "weight") and not isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return PeftMerge(layer)  # convolutions
    raise UserError(f"The adapter on {name} is a {type(layer).__name__}, which cannot be merged here: use PEFT.")
