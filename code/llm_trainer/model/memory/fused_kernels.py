# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Liger's kernels in a traced step. They hold what its autograd functions hold, and compute nothing.

Liger needs Triton, and Triton a GPU. An estimate is made on laptops too. What is held is read off liger_kernel/ops of
the pinned version, and which modules get a kernel off its monkey_patch.py. The tests run Liger's own functions.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

ROPE = "apply_rotary_pos_emb"
# Liger leaves these as they are, by model type.
PLAIN_ROPE = frozenset(
    {"deepseek_v2", "deepseek_v3", "gemma4_text", "glm4", "llama4_text", "qwen3_5_text", "qwen3_next"}
)
PLAIN_HEAD_NORMS = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "olmo2", "olmo3"})
PLAIN_EXPERTS = frozenset({"gpt_oss", "llama4_text"})
HEAD_NORMS = frozenset({"q_norm", "k_norm", "query_layernorm", "key_layernorm"})


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and a float32 number a row. The result has the input's type, not the weight's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the result for an input (..., size) and a weight (size,)."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of input and weight. Some models' kernels write over the gradient, others do not."""
        weight = ctx.saved_tensors[1]
        return torch.empty_like(gradient), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class FusedGate(torch.autograd.Function):
    """Product of an activated gate with its values. It keeps both, and their gradients take their place."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the product of two tensors of one shape."""
        gate, values = gate.contiguous(), values.contiguous()
        ctx.save_for_backward(gate, values)
        return gate * values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of gate and values, for which all three are read and both are written over."""
        gate, values = ctx.saved_tensors
        gate.mul_(gradient)
        values.copy_(gate)
        return gate.view_as(gate), values.view_as(values)


class FusedRope(torch.autograd.Function):
    """Rotation of queries and keys in place, which keeps cosines and sines alone."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys, each (batch, heads, tokens, head size)."""
        ctx.save_for_backward(cos, sin)
        return store_by_token(q), store_by_token(k)

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> Any:
        """Return the gradients of queries and keys."""
        return store_by_token(q), store_by_token(k), None, None


def store_by_token(x: torch.Tensor) -> torch.Tensor:
    """Return (batch, heads, tokens, head size) so that the heads of a token lie together, as projections leave them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class FusedExperts(torch.autograd.Function):
    """Experts in grouped products. They keep what is activated, and make gradients of frozen weights too."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Return (tokens, size) for (tokens, size), the experts' weights, and shares (tokens, chosen experts)."""
        rows, width = shares.numel(), gate_up.shape[1]
        before = torch.empty(rows, width, dtype=x.dtype)
        after = torch.empty(rows, width // 2, dtype=x.dtype)
        by_expert = torch.empty(rows, x.shape[1], dtype=x.dtype)
        out = torch.empty_like(x)
        del after, by_expert
        order = torch.empty(3, rows, dtype=torch.int32)
        ctx.save_for_backward(x, gate_up, down, before, shares, order)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of input, weights and shares."""
        x, gate_up, down, before, shares, _ = ctx.saved_tensors
        d_before = torch.empty_like(before, dtype=gradient.dtype)
        weighted = torch.empty(before.shape[0], before.shape[1] // 2, dtype=gradient.dtype)
        d_down = torch.empty_like(down)
        by_expert = torch.empty(before.shape[0], x.shape[1], dtype=gradient.dtype)
        d_x, d_gate_up = torch.empty_like(x, dtype=gradient.dtype), torch.empty_like(gate_up)
        del d_before, weighted, by_expert
        return d_x, d_gate_up, d_down, torch.empty_like(shares, dtype=gradient.dtype)


def replace_modules(base: PreTrainedModel, kernels: frozenset[str]) -> None:
    """Have the modules of a skeleton hold what Liger's `kernels` hold, by the names of its options."""
    model_type = base.config.get_text_config().model_type
    gated = ("geglu" if model_type.startswith("gemma") else "swiglu") in kernels
    for name, module in base.named_modules():
        if forward := find_stand_in(name, module, model_type, gated=gated, normed="rms_norm" in kernels):
            module.forward = functools.partial(forward, module)


def find_stand_in(
    name: str, module: nn.Module, model_type: str, *, gated: bool, normed: bool
) -> Callable[..., torch.Tensor] | None:
    """Return the forward pass of a module that Liger has a kernel for, or None."""
    if type(module).__name__.endswith("RMSNorm"):
        plain = model_type in PLAIN_HEAD_NORMS and name.rpartition(".")[2] in HEAD_NORMS
        return apply_norm if normed and not plain and getattr(module, "weight", None) is not None else None
    if not gated or not hasattr(module, "down_proj"):
        return None
    if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
        return None if model_type in PLAIN_EXPERTS else apply_experts
    if hasattr(module, "gate_up_proj"):
        return apply_joint_gate
    return apply_gate if hasattr(module, "gate_proj") else None


def apply_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute an RMSNorm."""
    return FusedNorm.apply(x, module.weight)


def apply_gate(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute an MLP whose gate and values are two products."""
    return module.down_proj(FusedGate.apply(module.gate_proj(x), module.up_proj(x)))


def apply_joint_gate(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute an MLP whose gate and values are one product."""
    gate, values = module.gate_up_proj(x).chunk(2, dim=-1)
    return module.down_proj(FusedGate.apply(gate, values))  # both stay until the end, as in Liger's code


def apply_experts(module: nn.Module, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Compute a layer's experts for the tokens that chose them."""
    rows = x.view(-1, x.shape[-1])
    return FusedExperts.apply(rows, module.gate_up_proj, module.down_proj, shares.view(rows.shape[0], -1)).view(x.shape)


@contextmanager
def replace_rope(base: PreTrainedModel, kernels: frozenset[str]) -> Iterator[None]:
    """Have the model's code rotate as Liger does, within the block, where `kernels` say so."""
    code = sys.modules[type(base).__module__]
    plain = getattr(code, ROPE, None)
    if plain is None or "rope" not in kernels or base.config.get_text_config().model_type in PLAIN_ROPE:
        yield
        return
    setattr(code, ROPE, lambda q, k, cos, sin, *_, **__: FusedRope.apply(q, k, cos, sin))
    try:
        yield
    finally:
        setattr(code, ROPE, plain)
