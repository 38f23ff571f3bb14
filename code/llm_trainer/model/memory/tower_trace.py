# SPDX-License-Identifier: Apache-2.0
"""A trace of the images of a batch on their way through a model's tower: the memory that they take, and the work.

The model's own code runs on what its processor makes of the images. Weights and pixels have no numbers. All else has,
as code asks for it: the grids of patches, for example. Where code looks at pixels, for images of padding, none is.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from llm_trainer.common.errors import quote_error
from llm_trainer.model.lora import find_base_model
from llm_trainer.model.memory.offloading import Offload
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError
from llm_trainer.model.memory.step_trace import (
    ATEN,
    HeldBytes,
    Span,
    Step,
    list_tensors,
    make_computable,
    replace_kernels,
)

# What a tower hands to the decoder, by the names that Transformers' models have for it.
FEATURES = ("pooler_output", "deepstack_features")
ANSWERS = {ATEN.eq: False, ATEN.ne: True}  # of comparisons with pixels


@dataclass(frozen=True)
class TowerTrace:
    """Spans of the tower in a step, beside its weights and the pixels."""

    forward: Span
    backward: Span  # nothing where the tower is frozen
    flops: float  # operations of the forward pass, in products and attention
    backward_flops: float  # the same of the backward pass, with what is computed again


def trace_tower(shape: ModelShape, step: Step, accumulates: bool) -> TowerTrace | None:
    """Return what the images of a step's batch take in the tower; None without images.

    Where gradients of several batches are added up, each is there only until it is added.
    Raise UnknownShapeError where the model's code asks for the numbers of pixels.
    """
    if step.images is None:
        return None
    alike = replace(step, length=2, has_mask=False, num_scored=None, teacher_width=None)  # what no tower depends on
    return trace_images(shape, alike, accumulates)


@functools.lru_cache(maxsize=64)
def trace_images(shape: ModelShape, step: Step, accumulates: bool) -> TowerTrace:
    """Return the same for a step that differs from others in nothing but what the tower depends on."""
    try:
        return run_fake_tower(shape, step, accumulates)
    except UnknownShapeError:
        raise
    except Exception as error:  # the code of any model runs here, which may ask for anything
        raise UnknownShapeError(f"its tower does not run without numbers: {quote_error(error)}") from error


def run_fake_tower(shape: ModelShape, step: Step, accumulates: bool) -> TowerTrace:
    """Run the tower of a copy of the skeleton whose weights have no numbers, and return what was counted."""
    mode, model = FakeTensorMode(allow_non_fake_inputs=True), copy.deepcopy(shape.skeleton)
    base = find_base_model(model)
    with mode:
        make_computable(model, base, step)
    inputs = fake_pixels(step, mode)
    parameters = list(model.parameters())
    offload = Offload(parameters) if step.offload_activations else None
    held = HeldBytes([*parameters, *model.buffers(), *inputs.values()], "forward", offload)
    counted = Numbers(mode)
    with counted, held, ExitStack() as hooks:
        hooks.enter_context(offload or nullcontext())
        hooks.enter_context(replace_kernels(held, step.on_gpu))
        hooks.enter_context(counted.count_attention())
        hooks.enter_context(torch.set_grad_enabled(step.trains))
        with torch.autocast("cpu", step.compute_dtype, enabled=step.compute_dtype != torch.float32):
            features = look(base, inputs)
        forward_flops = counted.flops
        held.begin("backward")
        learning = [each for each in features if each.requires_grad]
        if accumulates:
            drop_gradients(model)
        if learning:
            torch.autograd.backward(learning, [torch.empty_like(each) for each in learning])
        held.begin("over")
    return TowerTrace(held.spans["forward"], held.spans["backward"], forward_flops, counted.flops - forward_flops)


def fake_pixels(step: Step, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch's images, with numbers but for pixels."""
    assert step.images is not None
    inputs = step.images.repeat(step.num_sequences)
    with mode:
        return {
            name: torch.empty(value.shape, dtype=value.dtype) if value.is_meta else value
            for name, value in inputs.items()
        }


def look(base: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what a model's tower makes of images. Raise UnknownShapeError where no class of the model tells."""
    seer: Any = next((module for module in base.modules() if hasattr(module, "get_image_features")), None)
    if seer is None:
        raise UnknownShapeError(f"{type(base).__name__} does not tell what its tower makes of images")
    taken = inspect.signature(seer.get_image_features).parameters
    seen = seer.get_image_features(**{name: value for name, value in inputs.items() if name in taken})
    return list_tensors([getattr(seen, name, None) for name in FEATURES]) or list_tensors(seen)


def drop_gradients(model: nn.Module) -> None:
    """Have each gradient of a weight go once it is made."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


class Numbers(TorchDispatchMode):
    """Mode in which code that asks about pixels finds each unlike all that it is compared with; counts operations.

    So no image is padding, whose pixels are all zero.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes
        self.flops = 0.0

    @contextmanager
    def count_attention(self) -> Iterator[None]:
        """Count, within the block, the operations of fused attention: its backward pass has twice as many."""
        attend = nn.functional.scaled_dot_product_attention

        def counted(q: torch.Tensor, k: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
            self.flops += (forward := 4 * q.numel() * k.shape[-2])
            out = attend(q, k, *others, **options)
            if out.requires_grad:
                out.register_hook(functools.partial(self.count_backward, 2 * forward))
            return out

        nn.functional.scaled_dot_product_attention = counted
        try:
            yield
        finally:
            nn.functional.scaled_dot_product_attention = attend

    def count_backward(self, flops: float, gradient: torch.Tensor) -> None:
        """Count the operations of a backward pass that a gradient has come to."""
        self.flops += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in ANSWERS and isinstance(args[0], FakeTensor):
            return torch.full(args[0].shape, ANSWERS[packet])
        if packet is ATEN.index:
            args = args[0], [each for index in args[1] for each in spell_out(index)]
        is_new = packet is ATEN.empty and kwargs.get("dtype", torch.float32).is_floating_point
        with self.fakes if is_new else nullcontext():
            out = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def spell_out(index: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """Yield an index of a tensor. A mask becomes the places of each dimension at which it is true."""
    if index is None or index.dtype != torch.bool:
        yield index
    else:
        yield from index.nonzero().unbind(1)
