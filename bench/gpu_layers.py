# SPDX-License-Identifier: Apache-2.0
"""Layers whose worth bench/gpu.py measures before the product gets them: products in float8."""

import functools
from typing import Any

import torch
from torch import nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


@functools.cache
def compile_scaling() -> Any:
    """Compiled, as the passes over a tensor would otherwise cost more than the product saves."""
    return torch.compile(scale_rows, dynamic=False) if torch.cuda.is_available() else scale_rows


def scale_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [rows, columns] in float8, and a scale [rows, 1] that gives each row back."""
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (matrix.float() / scale).to(FLOAT8), scale


def multiply(left: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor) -> torch.Tensor:
    """left [m, k] in bf16 times right [n, k] transposed, in float8: [m, n] in bf16."""
    small, scale = compile_scaling()(left)
    if not left.is_cuda:
        return ((small.float() * scale) @ (right.float() * right_scale).t()).to(left.dtype)
    return torch._scaled_mm(
        small, right.t(), scale_a=scale, scale_b=right_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


class Float8Product(torch.autograd.Function):
    """x [..., in] times a frozen weight [out, in]; its gradient with a copy that is scaled along the other side."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight, scale, turned, turned_scale) -> torch.Tensor:
        ctx.save_for_backward(turned, turned_scale)
        return multiply(x.flatten(0, -2), weight, scale).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        turned, turned_scale = ctx.saved_tensors
        found = multiply(gradient.flatten(0, -2), turned, turned_scale).unflatten(0, gradient.shape[:-1])
        return found, None, None, None, None


class Float8Linear(nn.Linear):
    """A frozen layer of bf16 that multiplies in float8, its weight kept twice: a scale for each row of either side."""

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "Float8Linear":
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        weight, scale = scale_rows(layer.weight.data)
        turned, turned_scale = scale_rows(layer.weight.data.t().contiguous())
        made.parts = (weight, scale, turned, turned_scale)
        made.weight = nn.Parameter(layer.weight.data[:1], requires_grad=False)  # PEFT asks for its type and place
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Float8Product.apply(x.to(torch.bfloat16) if x.is_cuda else x, *self.parts)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """For fused adapters: gradients [tokens, in] for [tokens, out]."""
        return multiply(gradient, *self.parts[2:])


class SmallFloat8Linear(nn.Linear):
    """The same with one scale for the whole weight, kept once: the backward pass turns it around.

    A GPU of Hopper multiplies float8 only where the right side lies by columns, so the turned weight has to be made.
    For fused adapters alone, whose function does not follow what happens in here.
    """

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "SmallFloat8Linear":
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.data
        scale = weight.abs().max().float() / LARGEST
        made.small, made.scale = (weight.float() / scale).to(FLOAT8), scale
        made.weight = nn.Parameter(weight[:1], requires_grad=False)  # PEFT asks for its type and place
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.small, self.scale.expand(self.out_features, 1).contiguous())

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """For fused adapters: gradients [tokens, in] for [tokens, out]."""
        scale = self.scale.expand(self.in_features, 1).contiguous()
        return multiply(gradient, self.small.t().contiguous(), scale)
