# SPDX-License-Identifier: Apache-2.0
"""LoRA layers whose adapter is added within the base's product, forward and backward.

PEFT scales the adapter's output and adds it in passes over tensors as large as the layer's output. Autograd does so
with the gradients. A matrix product can add to what is there. It also rounds once, where PEFT rounds three times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class FrozenProduct:
    """The product of a frozen layer, and what an adapter is added to it with."""

    forward: Product  # (tokens, in) to (tokens, out)
    backward: Product  # gradients (tokens, out) of its output to those (tokens, in) of its input
    dtype: torch.dtype  # that it computes in
    scaling: float  # of the adapter's output


class AdaptedProduct(torch.autograd.Function):
    """The output of a frozen layer, with an adapter's added in place. The input is kept once, in the product's type."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: FrozenProduct
    ) -> torch.Tensor:
        """Return (tokens, out) for an input (tokens, in), A (rank, in) and B (out, rank)."""
        ctx.base, ctx.dtypes = base, (x.dtype, first.dtype, second.dtype)
        x = x.to(base.dtype)
        first, second = first.to(base.dtype), second.to(base.dtype)
        inner = multiply_scaled(x, first.t(), base.scaling)  # (tokens, rank)
        ctx.save_for_backward(x, inner, first, second)
        return base.forward(x).addmm_(inner, second.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the input, of A and of B. Without a gradient of the input a product is saved."""
        x, inner, first, second = ctx.saved_tensors
        x_type, first_type, second_type = ctx.dtypes
        through = multiply_scaled(gradient, second, ctx.base.scaling)  # (tokens, rank)
        of_first = multiply_as(first_type, through.t(), x)
        of_second = multiply_as(second_type, gradient.t(), inner)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.base.backward(gradient).addmm_(through, first).to(x_type)
        return of_x, of_first, of_second, None


def multiply_scaled(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the product of two matrices times a number, rounded once."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scaling)


def multiply_as(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product of two matrices in `dtype`. A GPU leaves its float32 sums as they are."""
    if left.is_cuda and dtype == torch.float32 != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def fuse_adapters(model: nn.Module) -> None:
    """Have each LoRA layer that can add its adapter within the base's product."""
    for layer in model.modules():
        if is_fusable(layer):
            layer.forward = MethodType(forward_adapted, layer)


def is_fusable(layer: nn.Module) -> bool:
    """Tell whether a module is a LoRA layer without dropout, variant or bias, on a layer whose product is known."""
    return (
        isinstance(layer, lora.LoraLayer)
        and is_plain(layer)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        and find_back_product(layer.base_layer) is not None
    )


def is_plain(layer: lora.LoraLayer) -> bool:
    """Tell whether a LoRA layer computes as PEFT's for linear layers do, in full precision or in 4 bit."""
    return (type(layer) is lora.Linear and not layer.fan_in_fan_out) or type(layer).__name__ == "Linear4bit"


def find_back_product(base: nn.Module) -> Product | None:
    """Return the function that turns gradients (tokens, out) of a frozen layer into new ones (tokens, in), or None."""
    if own := getattr(base, "multiply_back", None):
        return own
    if type(base).__name__ == "Linear4bit":
        return lambda gradient: multiply_by_packed(gradient, base)
    if type(base) is nn.Linear:
        return lambda gradient: gradient @ base.weight.to(gradient.dtype)
    return None


def multiply_by_packed(gradient: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """Return gradients (tokens, in) for (tokens, out) of a layer whose matrix bitsandbytes holds in 4 bit."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(base.weight, "quant_state", None) or base.quant_state  # FSDP2 gathers weights without their state
    return gradient @ dequantize_4bit(base.weight.data, state).to(gradient.dtype)


def forward_adapted(layer: lora.LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute a LoRA layer: fused where one adapter is active and types agree, and as PEFT does anywhere else."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    dtype = find_product_type(layer, x, names[0]) if len(names) == 1 else None
    backward = find_back_product(layer.base_layer)
    if args or kwargs or layer.disable_adapters or layer.merged or dtype is None or backward is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    name = names[0]
    product = FrozenProduct(layer.base_layer, backward, dtype, layer.scaling[name])
    flat = x.reshape(-1, x.shape[-1])
    out = AdaptedProduct.apply(flat, layer.lora_A[name].weight, layer.lora_B[name].weight, product)
    return out.view(*x.shape[:-1], -1)  # not within the function, as models may change it in place (Gemma 3n)


def find_product_type(layer: lora.LoraLayer, x: torch.Tensor, name: str) -> torch.dtype | None:
    """Return the type in which base and adapter both compute, or None where PEFT computes them in two types."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return (
            dtype if type(layer) is lora.Linear or x.dtype == dtype else None
        )  # bitsandbytes returns the input's type
    return x.dtype if x.dtype == layer.lora_A[name].weight.dtype else None
