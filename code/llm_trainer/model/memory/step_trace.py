# SPDX-License-Identifier: Apache-2.0
"""What a training step does to memory: the step itself, run on tensors without numbers, and every byte counted.

The model's own code runs, with autocast, adapters, checkpointing and TRL's loss, so that any architecture is counted as
it is. `memory.py` says what this means on a device.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from llm_trainer.common.errors import quote_error
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError

FUSED = "fused"  # stands for the kernels of models that have none for sdpa
OFFLOADED_BYTES = 1024  # TRL leaves smaller activations where they are


@dataclass(frozen=True)
class Span:
    """A stretch of a step, in bytes: its peak above what was held when it began, and what it left behind at its end."""

    peak: int
    net: int


@dataclass(frozen=True)
class StepTrace:
    """A step of the traced layers, one after the other, in bytes. Weights and the optimizer are not in it."""

    embedding: Span
    forward: tuple[Span, ...]  # of each traced layer
    head: Span  # the last norm, the output layer and the loss, forward and backward
    backward: tuple[Span, ...]  # of each traced layer, in the order of the forward pass
    end: Span  # what of the backward pass is left below the first layer
    offloaded: tuple[int, ...]  # of each traced layer: what lies in the host's memory until the backward pass


class HeldBytes(TorchDispatchMode):
    """Counts the storages that operations made and that are alive, in named spans."""

    def __init__(self, known: list[torch.Tensor], first_span: Hashable) -> None:
        super().__init__()
        self.held = self.highest = self.began = 0
        self.seen = WeakIdKeyDictionary()  # a storage is counted once, however many tensors look at it
        for tensor in known:
            self.seen[tensor.untyped_storage()] = None
        self.spans: dict[Hashable, Span] = {}
        self.name = first_span

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = None
        self.held += size
        self.highest = max(self.highest, self.held)
        weakref.finalize(storage, self.release, size)

    def release(self, size: int) -> None:
        self.held -= size

    def begin(self, name: Hashable) -> None:
        """End the span that is under way, and begin the one of this name."""
        self.spans[self.name] = Span(self.highest - self.began, self.held - self.began)
        self.name = name
        self.began = self.highest = self.held


class Offload(saved_tensors_hooks):
    """What TRL's activation offloading leaves on the device: a saved activation is gone until it is asked for."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.moved_bytes = 0
        known = {id(tensor.untyped_storage()) for tensor in parameters}

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.nbytes < OFFLOADED_BYTES or id(tensor.untyped_storage()) in known:
                return tensor
            self.moved_bytes += tensor.nbytes
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            shape, stride, dtype = packed
            return torch.empty_strided(shape, stride, dtype=dtype)

        super().__init__(pack, unpack)


@dataclass(frozen=True)
class Step:
    """What a step is traced for: a device's batch, and how it is computed."""

    num_sequences: int
    length: int  # tokens of a sequence
    has_mask: bool  # [sequences, 1, length, length], where rows are padded or share sequences and the kernel needs one
    stores_scores: bool  # of attention, as eager does and fused kernels do not
    compute_dtype: torch.dtype
    recompute_activations: bool  # in the backward pass
    offload_activations: bool  # to the host's memory until the backward pass
    sharded: bool  # weights come gathered in the type of the computation
    on_gpu: bool


@functools.lru_cache(maxsize=32)
def trace_step(shape: ModelShape, step: Step) -> StepTrace:
    """Forward and backward pass of the shape's skeleton.

    Raises UnknownShapeError where the model's code wants to know the numbers that the tensors do not have.
    """
    try:
        return run_fake_step(shape, step)
    except Exception as error:  # the code of any model runs here, which may ask for anything
        raise UnknownShapeError(f"its code does not run without numbers: {quote_error(error)}") from error


def run_fake_step(shape: ModelShape, step: Step) -> StepTrace:
    mode = FakeTensorMode()
    model = copy.deepcopy(shape.skeleton)
    with mode:
        make_computable(model, step)
        layers = model.get_submodule(shape.layers_name)
        batch = build_batch(step)
    parameters = list(model.parameters())
    held = HeldBytes([*parameters, *model.buffers()], first_span="embedding")
    offload = Offload(parameters) if step.offload_activations else None
    moved: list[int] = []  # when each layer begins, and when the last one ends
    with mode, held, ExitStack() as hooks:
        for number, layer in enumerate(layers):
            trace_layer(
                layer, number, len(layers), held, hooks, lambda: moved.append(offload.moved_bytes if offload else 0)
            )
        hooks.enter_context(offload or nullcontext())
        hooks.enter_context(replace_kernels(step.on_gpu))
        with torch.autocast("cpu", step.compute_dtype, enabled=step.compute_dtype != torch.float32):
            output = model(**batch, fused_lm_head=True)
        moved.append(offload.moved_bytes if offload else 0)
        loss = -output.log_probs.sum()
        del output
        loss.backward()
        held.begin("over")
        del loss
    nothing = Span(0, 0)  # of a layer below all that is trained, which has no backward pass
    return StepTrace(
        embedding=held.spans["embedding"],
        forward=tuple(held.spans["forward", number] for number in range(len(layers))),
        head=held.spans["head"],
        backward=tuple(held.spans.get(("backward", number), nothing) for number in range(len(layers))),
        end=held.spans.get("end", nothing),
        offloaded=tuple(after - before for before, after in pairwise(moved)),
    )


def make_computable(model: nn.Module, step: Step) -> None:
    """Make a skeleton a model that can compute, and that trains as TRL's trainer would have it."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        casts = step.sharded and tensor.is_floating_point()
        dtype = step.compute_dtype if casts else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)

    for module in model.modules():
        if hasattr(module, "rope_type"):
            module.rope_type = "default"  # others look at the numbers of the positions; the sizes are the same
        if hasattr(module, "quantization"):
            module.forward = functools.partial(apply_quantized, module)
    model._apply(fill)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.tie_weights()
    if not step.stores_scores:
        base.set_attn_implementation("sdpa" if base._supports_sdpa else FUSED)
    if step.recompute_activations:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    if base._can_set_experts_implementation():
        base.set_experts_implementation("grouped_mm")  # the plain loop asks for numbers
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model.train()


def build_batch(step: Step) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(step.num_sequences, step.length, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    mask_shape = step.num_sequences, 1, step.length, step.length
    return {**batch, "attention_mask": torch.ones(mask_shape, dtype=torch.bool)} if step.has_mask else batch


class QuantizedProduct(torch.autograd.Function):
    """What bitsandbytes' products hold: the weights unpacked, while they multiply; in 8 bit the input too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, keeps_input: bool) -> torch.Tensor:
        ctx.weight, ctx.input = weight, x if keeps_input else None
        return x @ torch.empty(weight.shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ torch.empty(ctx.weight.shape, dtype=gradient.dtype), None, None


class FusedAttention(torch.autograd.Function):
    """What fused kernels hold for the backward pass: queries, keys, values, the result and its normalizers, the mask.

    Flash attention 2 (Dao 2023, arXiv:2307.08691); torch's kernels save the same (derivatives.yaml).
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, heads, length, _ = q.shape  # (batch, heads, tokens, size of a head)
        out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(batch, heads, length), mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *(torch.empty_like(each) for each in ctx.saved_tensors[:3]), None


def apply_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    mask = attn_mask if attn_mask is None or attn_mask.requires_grad else attn_mask.to(dtype)  # of bools, at first
    return FusedAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask)


def call_attention(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' interface to a kernel."""
    return apply_attention(q, k, v, mask).transpose(1, 2), None


AttentionInterface.register(FUSED, call_attention)
AttentionMaskInterface.register(FUSED, masking_utils.sdpa_mask)


def apply_quantized(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    compute_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    out = QuantizedProduct.apply(x.to(compute_dtype), module.weight, module.quantization == "int8")
    return out if module.bias is None else out + module.bias


def trace_layer(
    layer: nn.Module, number: int, num_layers: int, held: HeldBytes, hooks: ExitStack, note: Callable[[], None]
) -> None:
    """Have a layer's forward and backward pass counted as spans of their own."""

    def begins(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if held.name == ("forward", number - 1) or held.name == "embedding":  # else it is computed a second time
            held.begin(("forward", number))
            note()
            if number == 0 and inputs and inputs[0].requires_grad:
                inputs[0].register_hook(lambda gradient: held.begin("end"))

    def ends(module: nn.Module, inputs: Any, output: Any) -> None:
        if held.name != ("forward", number):
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: held.begin(("backward", number)))
        if number == num_layers - 1:
            held.begin("head")

    for handle in (layer.register_forward_pre_hook(begins), layer.register_forward_hook(ends)):
        hooks.callback(handle.remove)


@contextmanager
def replace_kernels(on_gpu: bool) -> Iterator[None]:
    """What a device computes otherwise than tensors without numbers do.

    Attention: a fused kernel stores no scores. On a GPU TRL's loss: a kernel works on the logits in place, and products
    add up in float32; and dropout: its mask is of bytes.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    with ExitStack() as originals:
        on_both = (
            (nn.functional, "scaled_dot_product_attention", apply_attention),
            (masking_utils, "find_packed_sequence_indices", nothing),  # it would ask for the positions
            (trl_utils, "_use_triton", nothing),  # the LM head scores all positions, as each may have a label
        )
        only_on_gpu = (
            (chunked_logprob, "_forward_tile", nothing),
            (chunked_logprob, "_backward_tile", nothing),
            (chunked_logprob, "_addmm_fp32", nothing),
            (nn.functional, "dropout", dropout),
        )
        for owner, name, stand_in in (*on_both, *(only_on_gpu if on_gpu else ())):
            originals.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        yield
