# SPDX-License-Identifier: Apache-2.0
"""Frozen linear layers that multiply in float8, which the tensor cores of current GPUs do twice as fast as bfloat16.

Both sides of a product are rounded to e4m3, with a scale for each row of the left and each column of the right side.
Its three bits of mantissa round a number by 2^-4 of it at most. Others take e5m2 for gradients. It rounds twice as
coarsely, for a range that is not needed where each row has its scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.model.device import Device

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_ROW = 1e-30  # the least that a row's largest number counts as: rows of zeros have no scale of their own
MULTIPLE = 16  # a GPU multiplies matrices in float8 whose sides are multiples of this
CAPABILITY = (8, 9)  # Ada's; Ampere has no float8


class Float8Product(torch.autograd.Function):
    """The product with a frozen layer's matrix. It keeps no input, as nothing but the input gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "Float8Linear") -> torch.Tensor:
        """Return (tokens, out) for an input (tokens, in)."""
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient (tokens, in) of the input for the gradient (tokens, out) of the output."""
        return ctx.layer.multiply_back(gradient), None


class Float8Linear(nn.Linear):
    """A frozen linear layer whose matrix is kept in float8 twice: as it is, and turned for the backward pass.

    A GPU multiplies float8 only where both sides lie along the sum, so that either pass needs a copy of its own. Both
    take what the matrix took in bfloat16.
    """

    turned: torch.Tensor  # (in, out)
    scales: torch.Tensor  # (out, 1)
    turned_scales: torch.Tensor  # (in, 1)

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        numbers, scales = scale_rows(layer.weight.detach())
        turned, turned_scales = scale_rows(layer.weight.detach().t().contiguous())
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.bias = layer.bias
        for name, made in {"scales": scales, "turned": turned, "turned_scales": turned_scales}.items():
            self.register_buffer(name, made, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out) for an input (..., in), on a GPU in bfloat16."""
        flat = x.reshape(-1, x.shape[-1])
        out = Float8Product.apply(flat.to(torch.bfloat16) if x.is_cuda else flat, self)
        out = out.view(*x.shape[:-1], -1)  # not within the function, as models may change it in place
        return out if self.bias is None else out + self.bias

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (tokens, out) for (tokens, in), without the bias."""
        return multiply(x, self.weight, self.scales)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return gradients (tokens, in) for gradients (tokens, out). Fused adapters ask for this."""
        return multiply(gradient, self.turned, self.turned_scales)


def multiply(left: torch.Tensor, right: torch.Tensor, right_scales: torch.Tensor) -> torch.Tensor:
    """Return left (m, k) times right (n, k) transposed: (m, n). The right side is in float8 already.

    A CPU, which has no such product, computes what a GPU does, apart from the order in which it adds up.
    """
    small, scales = scale_rows(left)
    if left.is_cuda:
        kind = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(small, right.t(), scale_a=scales, scale_b=right_scales.t(), **kind)
    return ((small.float() @ right.float().t()) * scales * right_scales.t()).to(left.dtype)


def scale_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix (rows, columns) in float8, and the float32 scales (rows, 1) that give its rows back."""
    if matrix.is_cuda:
        from llm_trainer.model.layers.float8_kernel import scale_rows_on_gpu  # Triton is installed with torch's CUDA

        return scale_rows_on_gpu(matrix)
    scales = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_ROW) / LARGEST
    return (matrix.float() / scales).to(FLOAT8), scales


def convert_base(model: PeftModel, names: Sequence[str]) -> str:
    """Have linear layers of an adapted base, by their names in it, multiply in float8. Return a line for the log.

    The same base always becomes the same. Layers are converted one after the other, and their own matrices freed. They
    stay as they are where they are trained, or a GPU could not multiply their shape.
    """
    base = model.get_base_model()
    num_converted = 0
    for name in names:
        parent, leaf = find_place(base, name)
        layer = getattr(parent, leaf)
        if can_convert(layer):
            setattr(parent, leaf, Float8Linear(layer))
            num_converted += 1
    leave_to_each_rank(model)
    return describe_conversion(base, num_converted, len(names))


def find_place(base: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a layer of the base, and its name there. PEFT puts an adapted one into its own."""
    layer = base.get_submodule(name)
    if isinstance(layer, Linear):
        return layer, "base_layer"
    parent, _, leaf = name.rpartition(".")
    return base.get_submodule(parent), leaf


def can_convert(layer: nn.Module) -> bool:
    """Tell whether a layer computes as PyTorch's linear layers do, is frozen, and has a shape for float8."""
    return (
        type(layer) is nn.Linear
        and not any(parameter.requires_grad for parameter in layer.parameters())
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    )


def leave_to_each_rank(model: nn.Module) -> None:
    """Have DDP send no matrices in float8 to other ranks, which have the same, and whose backend may not know the type.

    `model` is the one that DDP wraps.
    """
    names = [
        f"{prefix}.{name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, Float8Linear)
        for name in ("weight", *layer._buffers)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def describe_conversion(base: nn.Module, num_converted: int, num_layers: int) -> str:
    """Return a line for the log on how many layers multiply in float8, and what does not."""
    num_stacks = sum(parameter.ndim == 3 for parameter in base.parameters())
    experts = f"; {num_stacks} stacks of experts do not" if num_stacks else ""
    return f"float8: {num_converted} of {num_layers} linear layers multiply in float8{experts}"


def check_float8(device: Device, dtype: torch.dtype) -> None:
    """Raise UserError where a device, or a job that computes in this type, cannot multiply in float8."""
    if device.capability is None or device.capability < CAPABILITY:
        raise UserError(
            f"base_compute=fp8: {device} cannot multiply in float8, which takes an NVIDIA GPU of compute capability "
            "8.9 or later (L4, L40S, H100 and newer): leave it out."
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"base_compute=fp8: such products come out in bfloat16, and the job computes in {name}.")
    if device.is_here and (fault := try_product(device.torch)):
        raise UserError(f"base_compute=fp8: {device} cannot multiply in float8 here ({fault}): leave it out.")


def try_product(device: torch.device) -> str | None:
    """Multiply a small matrix on the device. Return why it cannot, or None."""
    ones = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        multiply(ones, *scale_rows(ones))
    except (RuntimeError, NotImplementedError, ImportError, AttributeError) as error:
        return quote_error(error)
    return None
