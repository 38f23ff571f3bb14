# SPDX-License-Identifier: Apache-2.0
"""The role of each parameter of a base model, which decides whether bitsandbytes quantizes it."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from llm_trainer.model.kinds.tower import list_tower
from llm_trainer.model.layers.reward_head import find_head

# `linear` is what bitsandbytes quantizes. `experts` are fused into one parameter, which it does not quantize, and the
# tower of a model that sees images stays as it is.
Role: TypeAlias = Literal["linear", "experts", "embeddings", "output", "tower", "other", "adapter"]


def assign_roles(base: PreTrainedModel) -> Iterator[tuple[str, Role]]:
    """Yield the name and the role of each parameter of a model without an adapter. A tied one comes once."""
    unquantized = [*get_keys_to_not_convert(base), *(base._keep_in_fp32_modules or ())]  # as Transformers has it
    output, tower = find_head(base), {*list_tower(base)}
    for name, parameter in base.named_parameters():
        path, _, own_name = name.rpartition(".")
        module = base.get_submodule(path)
        if name in tower:
            yield name, "tower"
        elif isinstance(module, nn.Embedding):
            yield name, "embeddings"
        elif module is output:
            yield name, "output"
        elif type(module) is nn.Linear and own_name == "weight" and should_convert_module(path, unquantized):
            yield name, "linear"
        else:
            yield name, "experts" if parameter.dim() == 3 and holds_experts(path, module) else "other"


def holds_experts(name: str, module: nn.Module) -> bool:
    """Tell whether a module holds experts by Transformers' names, as `mlp.experts` or JetMoeParallelExperts do."""
    return any(part.endswith("experts") for part in name.split(".")) or type(module).__name__.endswith("Experts")


def has_experts(base: PreTrainedModel) -> bool:
    """Tell whether a model holds experts that are fused into one parameter."""
    return any(role == "experts" for _, role in assign_roles(base))


def measure_linear_share(base: PreTrainedModel) -> float:
    """Return the share of a model's weights that bitsandbytes quantizes, from 0 to 1."""
    num_linear = sum(base.get_parameter(name).numel() for name, role in assign_roles(base) if role == "linear")
    return num_linear / base.num_parameters()
