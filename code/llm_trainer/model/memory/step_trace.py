# SPDX-License-Identifier: Apache-2.0
"""A trace of the memory of a training step, which runs on tensors without numbers while every byte is counted.

The model's own code runs, with autocast, adapters, checkpointing and TRL's loss. Any architecture is therefore counted
as it is. `estimate` says what this means on a device.
"""

import copy
import functools
import weakref
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction, Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations import moe
from trl.kernels import chunked_divergence, chunked_logprob
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from llm_trainer.common.errors import quote_error
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.kinds.tower import learns_to_see, spare_gradients
from llm_trainer.model.layers.kept_logits import KeptLogits
from llm_trainer.model.layers.reward_head import is_reward_model, read_last_tokens
from llm_trainer.model.lora import find_base_model, take_rows_as_whole
from llm_trainer.model.memory import fused_kernels
from llm_trainer.model.memory.offloading import Offload
from llm_trainer.model.memory.shape import BLOCK_SIZE, ModelShape, UnknownShapeError

ENDS = "ends"  # of answers, as a reward model takes them
FUSED = "fused"  # our attention kernel, for models that have no SDPA
MAX_OPERATIONS = 20_000  # a few seconds; a layer of attention takes about a hundred, forward and backward
ATEN = torch.ops.aten
DEVICE = torch.ops.prim.device.default
PRODUCTS = frozenset({ATEN.mm, ATEN.addmm, ATEN.addmm_, ATEN.bmm, ATEN.baddbmm, ATEN._grouped_mm})
COPIES = frozenset({ATEN.copy_, ATEN.embedding, ATEN.index, ATEN.index_select, ATEN.gather})
EMPTY = frozenset({ATEN.empty, ATEN.empty_like, ATEN.empty_strided})
UNFILLED = frozenset({ATEN.new_empty, ATEN.new_empty_strided})
# Operations a byte below which a product takes as long as its bytes. An adapter's have about its rank, and others
# thousands. GPUs are as fast at both at 60 to 400.
BOUND_OPERATIONS = 100
COUNTERS = ("moved", "launches", "functions")  # of a span
LARGE_HEAD = 128  # in numbers; flash attention rounds the sizes of larger heads further


@dataclass(frozen=True)
class Span:
    """A stretch of a step, in bytes.

    The peak is counted above what was held when it began. The net is what it left behind at its end. `moved` is read
    and written by all operations but the products that take as long as their arithmetic, which `flops` counts.
    `launches` counts operations that the host has to start on a GPU. `functions` counts its passes through autograd
    functions in Python.
    """

    peak: int
    net: int
    moved: int = 0
    launches: int = 0
    functions: int = 0


@dataclass(frozen=True)
class StepTrace:
    """Spans of a step of the traced layers, without weights and the optimizer."""

    embedding: Span
    forward: tuple[Span, ...]  # of each traced layer
    head: Span  # the last norm, the output layer and the loss, forward and backward
    backward: tuple[Span, ...]  # of each traced layer, in the order of the forward pass
    end: Span  # the backward pass below the first layer
    offloaded: tuple[int, ...]  # bytes of each traced layer that lie in the host's memory until the backward pass


class HeldBytes(TorchDispatchMode):
    """Counter of the storages that operations made and that are alive, in named spans.

    Bytes on their way to the host count in peaks, and in no net: they do not add up over layers.
    """

    def __init__(self, known: list[torch.Tensor], first_span: Hashable, offload: Offload | None = None) -> None:
        super().__init__()
        self.offload, self.leaving = offload, 0
        self.held = self.highest = self.began = self.num_operations = 0
        self.moved = self.launches = self.functions = 0
        self.seen = WeakIdKeyDictionary()  # a storage is counted once, however many tensors look at it
        for tensor in known:
            self.seen[tensor.untyped_storage()] = None
        self.spans: dict[Hashable, Span] = {}
        self.name = first_span

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        # Where torch's C++ asks for a device (prim), an error would end the process.
        if self.num_operations > MAX_OPERATIONS and func.namespace == "aten":
            raise UnknownShapeError("its code goes through a row token by token, which takes too long to follow")
        if func is DEVICE:  # two calls of three, in which nothing runs
            return args[0].device
        out = func(*args, **(kwargs or {}))
        inputs, tensors = list_tensors((args, kwargs)), list_tensors(out)
        if not is_view(func, inputs, tensors):
            self.launches += 1
            self.moved += count_moved_bytes(func, inputs, tensors)
        for tensor in tensors:
            self.count_storage(tensor.untyped_storage())
        return out

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as held, once, until it is freed."""
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = None
        self.held += size
        self.highest = max(self.highest, self.held)
        weakref.finalize(storage, self.release_bytes, size)

    def release_bytes(self, size: int) -> None:
        """Count the bytes of a storage as freed."""
        self.held -= size

    def begin(self, name: Hashable) -> None:
        """End the span that is under way, and begin the one of this name."""
        before, self.leaving = self.leaving, self.offload.count_leaving() if self.offload else 0
        net = self.held - self.began - (self.leaving - before)
        counts = self.moved, self.launches, self.functions
        self.spans[self.name] = Span(self.highest - self.began + before, net, *counts)
        self.name = name
        self.began = self.highest = self.held
        self.moved = self.launches = self.functions = 0

    def skip_alike(self, *bounds: int) -> Iterator[int]:
        """Yield the numbers of a range for a loop whose rounds are alike: the first two, and the last.

        The first finds nothing of another round, the second does, and the last may be smaller. Those that are left out
        hold and move what the second does.
        """
        numbers = range(*bounds)
        yield from numbers[:1]
        before = {name: getattr(self, name) for name in COUNTERS}
        yield from numbers[1:2]
        left_out = max(0, len(numbers) - 3)
        for name, count in before.items():
            setattr(self, name, count + (1 + left_out) * (getattr(self, name) - count))
        yield from numbers[2:][-1:]


@contextmanager
def count_functions(held: HeldBytes) -> Iterator[None]:
    """Count, within the block, each pass through an autograd function that is written in Python."""
    forward, backward = Function.apply.__func__, BackwardCFunction.apply

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        held.functions += 1
        return forward(cls, *args, **kwargs)

    def apply_back(node: BackwardCFunction, *args: Any) -> Any:
        held.functions += 1
        return backward(node, *args)

    Function.apply, BackwardCFunction.apply = classmethod(apply), apply_back
    try:
        yield
    finally:
        Function.apply, BackwardCFunction.apply = classmethod(forward), backward


def list_tensors(values: Any) -> list[torch.Tensor]:
    """List the tensors among an operation's arguments or results, which may lie in lists and dicts."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for each in values for tensor in list_tensors(each)]


def is_view(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Tell whether an operation only looks at what is there, for which nothing runs on a device."""
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return not func._schema.is_mutable and all(each.untyped_storage()._cdata in known for each in outputs)


def count_moved_bytes(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Return the bytes that an operation reads and writes. Products of large matrices count none.

    What is made empty stands for a kernel's result, for which it reads about as much. `new_empty` makes place for the
    product that comes next. A copy or a look-up reads what it writes.
    """
    written, operation = sum(each.nbytes for each in outputs), func.overloadpacket
    if operation in UNFILLED:
        return 0
    if operation in COPIES or operation in EMPTY:
        return 2 * written
    moved = written + sum(each.nbytes for each in inputs)
    if operation in PRODUCTS:
        depth = inputs[0 if operation is ATEN._grouped_mm else -2].shape[-1]
        return moved if 2 * depth * outputs[0].numel() < BOUND_OPERATIONS * moved else 0
    return moved


@dataclass(frozen=True)
class Step:
    """A step to trace: the batch of a device, and how it is computed."""

    num_sequences: int
    length: int  # tokens of a sequence
    has_mask: bool  # of shape (sequences, 1, length, length), where the kernel needs one
    stores_scores: bool  # whether attention keeps its scores, as eager does and fused kernels do not
    compute_dtype: torch.dtype
    recompute_activations: bool  # in the backward pass
    offload_activations: bool  # to the host's memory until the backward pass
    sharded: bool  # whether weights come gathered in the type of the computation
    on_gpu: bool
    fused_kernels: frozenset[str] = frozenset()  # of Liger's, by the names of its options
    trains: bool = True  # an evaluation has a forward pass alone, and keeps nothing for another
    num_scored: int | None = None  # tokens that predict a label; None: all, as each may
    teacher_width: int | None = None  # of the hidden states of a teacher whose probabilities are learnt; None without
    images: RowImages | None = None  # of its rows, which are alike; None without

    def find_num_scored(self) -> int:
        """Return the tokens that predict a label, or of those that may."""
        return self.num_sequences * self.length if self.num_scored is None else self.num_scored


@functools.lru_cache(maxsize=256)
def trace_step(shape: ModelShape, step: Step) -> StepTrace:
    """Trace the forward and the backward pass of the shape's skeleton.

    Raise UnknownShapeError where the model's code asks for the numbers that the tensors do not have.
    """
    try:
        return run_fake_step(shape, step)
    except UnknownShapeError:
        raise
    except Exception as error:  # the code of any model runs here, which may ask for anything
        if step.has_mask:  # older models and Mamba take no mask of four dimensions
            return trace_step(shape, replace(step, has_mask=False))
        raise UnknownShapeError(f"its code does not run without numbers: {quote_error(error)}") from error


def run_fake_step(shape: ModelShape, step: Step) -> StepTrace:
    """Run the step on a copy of the skeleton whose tensors have no numbers, and return what was counted."""
    mode, model = FakeTensorMode(), copy.deepcopy(shape.skeleton)
    base = find_base_model(model)
    with mode:
        make_computable(model, base, step)
        batch = build_batch(step, is_reward_model(base.config))
        taught = build_taught(base, step) if step.teacher_width else ()
    layers = model.get_submodule(shape.layers_name)
    parameters = list(model.parameters())
    offload = Offload(parameters) if step.offload_activations else None
    held = HeldBytes([*parameters, *model.buffers(), *taught], "embedding", offload)
    tracer = LayerTracer(held, offload, len(layers))
    with mode, held, ExitStack() as hooks:
        for index, layer in enumerate(layers):
            tracer.trace_layer(layer, index, hooks)
        hooks.enter_context(offload or nullcontext())
        hooks.enter_context(replace_kernels(held, step.on_gpu))
        hooks.enter_context(count_functions(held))
        hooks.enter_context(fused_kernels.replace_rope(base, step.fused_kernels))
        hooks.enter_context(torch.set_grad_enabled(step.trains))
        with torch.autocast("cpu", step.compute_dtype, enabled=step.compute_dtype != torch.float32):
            loss = compute_divergence(base, batch, *taught) if taught else compute_loss(model, batch)
        tracer.note_moved()
        if step.trains:
            loss.backward()
        held.begin("over")
        del loss
    return collect_trace(held.spans, len(layers), tracer.moved_bytes)


def compute_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss of a batch: TRL's of a causal language model, or one of a reward model's answers."""
    if ENDS in batch:
        return -nn.functional.logsigmoid(model(**batch).logits).mean()
    return -model(**batch, fused_lm_head=True).log_probs.sum()


def compute_divergence(
    base: PreTrainedModel, batch: dict[str, Any], taught_states: torch.Tensor, taught_head: torch.Tensor
) -> torch.Tensor:
    """Return TRL's loss of a student, from its teacher's hidden states and output layer."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    states = base.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    head = base.get_output_embeddings()
    student = states, head.weight, head.bias
    return ChunkedDivergenceFunction.apply(*student, taught_states, taught_head, None, 1.0)[0].sum()


def build_taught(base: PreTrainedModel, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states (scored, width) of a teacher, and the weights of its output layer."""
    rows = step.find_num_scored(), base.config.get_text_config().vocab_size
    states, head = (torch.empty(number, step.teacher_width, dtype=step.compute_dtype) for number in rows)
    return states, head


def collect_trace(spans: dict[Hashable, Span], num_layers: int, moved_bytes: list[int]) -> StepTrace:
    """Return the spans of a step as a trace. A layer below all that is trained has no backward pass."""
    nothing = Span(0, 0)
    return StepTrace(
        embedding=spans["embedding"],
        forward=tuple(spans["forward", index] for index in range(num_layers)),
        head=spans["head"],
        backward=tuple(spans.get(("backward", index), nothing) for index in range(num_layers)),
        end=spans.get("end", nothing),
        offloaded=tuple(after - before for before, after in pairwise(moved_bytes)),
    )


def make_computable(model: nn.Module, base: PreTrainedModel, step: Step) -> None:
    """Make a skeleton a model that can compute, prepared as TRL's trainer prepares it."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        casts = step.sharded and tensor.is_floating_point()
        dtype = step.compute_dtype if casts else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)

    for module in model.modules():
        if hasattr(module, "rope_type"):  # other types ask for the positions' numbers; the sizes are the same
            by_layer = module.rope_type if isinstance(module.rope_type, dict) else None
            module.rope_type = dict.fromkeys(by_layer, "default") if by_layer else "default"
        if hasattr(module, "quantization"):
            module.forward = functools.partial(apply_quantized, module)
            module.multiply_back = functools.partial(multiply_by_quantized, module)
        if isinstance(module, BaseTunerLayer) and hasattr(module.get_base_layer(), "quantization"):
            module.cast_input_dtype_enabled = not step.on_gpu  # bitsandbytes' layers ask for a GPU's autocast alone
    fused_kernels.replace_modules(base, step.fused_kernels)
    model._apply(fill)
    base.tie_weights()
    if not step.stores_scores:
        base.set_attn_implementation("sdpa" if base._supports_sdpa else FUSED)
    prepare_gradients(base, step)
    if base._can_set_experts_implementation():
        base.set_experts_implementation("grouped_mm")  # the plain loop asks for numbers
    prepare_head(base, step.num_scored)
    model.train(step.trains)


def prepare_gradients(base: PreTrainedModel, step: Step) -> None:
    """Have activations recomputed as a training does, and the decoder's input need a gradient where it does there."""
    if step.recompute_activations:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    elif step.images is not None and learns_to_see(base):  # the vectors of images among those of tokens
        base.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    spare_gradients(base)


def prepare_head(base: PreTrainedModel, num_scored: int | None) -> None:
    """Have a model compute what its trainer reads: TRL's output layer of the scored tokens, or answers' rewards."""
    if is_reward_model(base.config):
        read_last_tokens(base)
    else:
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        base.base_model.register_forward_hook(ScoredPlaces(num_scored))


def build_batch(step: Step, is_reward: bool) -> dict[str, Any]:
    """Return the model's inputs: tokens (sequences, length), labels, and a mask where the step has one.

    Labels are those of all tokens (sequences, length), or (1, scored) of the tokens that predict one. A reward model
    has the places of an answer's last token for each sequence in their stead.
    """
    tokens = torch.zeros(step.num_sequences, step.length, dtype=torch.long)
    mask_shape = step.num_sequences, 1, step.length, step.length
    mask = {"attention_mask": torch.ones(mask_shape, dtype=torch.bool)} if step.has_mask else {}
    if is_reward:
        return {"input_ids": tokens, ENDS: tokens[:, 0], "use_cache": False, **mask}
    labels = tokens.clone() if step.num_scored is None else tokens.new_zeros(1, step.num_scored)
    batch = {"input_ids": tokens, "labels" if step.num_scored is None else "shift_labels": labels}
    return batch | mask


class ScoredPlaces:
    """A hook that leaves the output layer the tokens that predict a label, as `training.batches.batch_facts` does."""

    def __init__(self, number: int | None) -> None:
        self.number = number  # None: all, and the output stays as it is

    def __call__(self, backbone: nn.Module, inputs: Any, output: Any) -> Any:
        """Return the output with the last hidden states of as many tokens, as one sequence."""
        if self.number is None:
            return output
        places = torch.zeros(self.number, dtype=torch.long)
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, places)[None]
        return output


class QuantizedProduct(Function):
    """Product with a quantized matrix, which in LLM.int8() keeps the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Linear) -> torch.Tensor:
        """Return (..., out) for an input (..., in)."""
        ctx.module, ctx.input = module, x if module.quantization == "int8" else None
        return make_product(x, module, module.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradient of the input."""
        return make_product(gradient, ctx.module, ctx.module.in_features), None


def make_product(x: torch.Tensor, module: nn.Linear, width: int) -> torch.Tensor:
    """Return a product (..., width) with a quantized matrix, beside what there is while it is computed.

    A product in float8 rounds the other side. bitsandbytes unpacks the matrix, whose scales it unpacks before.
    """
    if module.quantization == "fp8":
        operand, scales = x.to(torch.uint8), None
    else:
        scales = torch.empty(module.weight.numel() // BLOCK_SIZE, dtype=torch.float32)
        scales.add_(0)
        operand = torch.empty(module.weight.shape, dtype=x.dtype)
    product = x.new_empty(*x.shape[:-1], width)
    del operand, scales
    return product


class FusedAttention(Function):
    """Fused attention, which holds for the backward pass: queries, keys, values, result, normalizers and mask.

    So does flash attention 2 (Dao 2023, arXiv:2307.08691), and so do torch's kernels (derivatives.yaml).
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the result for queries, keys and values, each (batch, heads, tokens, head size)."""
        batch, heads, length, _ = q.shape  # (batch, heads, tokens, size of a head)
        out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(batch, heads, length), mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of queries, keys and values."""
        return *(torch.empty_like(each) for each in ctx.saved_tensors[:3]), None


class FlashAttention(FusedAttention):
    """Fused attention on a GPU."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of queries, keys and values, which are there while the buffers are."""
        q, k, v = ctx.saved_tensors[:3]  # read once, as a layer that is recomputed demands
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        make_flash_buffers(q, k, v)
        return *gradients, None


def make_flash_buffers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what flash attention's backward pass has beside gradients (csrc/flash_attn/flash_api.cpp, `mha_bwd`).

    It adds up the queries' gradient in float32, for heads of a rounded size, and has a number for each row of scores.
    Keys and values that several heads share first get a gradient for each head.
    """
    batch, heads, length, size = q.shape
    rounded = size + -size % (32 if size <= LARGE_HEAD else 64)
    sums = (torch.empty(batch, heads, length, rounded), torch.empty(batch, heads, length))
    shared = (torch.empty(batch, heads, *x.shape[2:], dtype=x.dtype) for x in (k, v) if x.shape[1] != heads)
    return *sums, *shared


def apply_attention(
    kernel: type[FusedAttention],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Compute attention in the type of autocast, in the place of torch's scaled_dot_product_attention."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    mask = attn_mask if attn_mask is None or attn_mask.requires_grad else attn_mask.to(dtype)  # masks begin as bools
    return kernel.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask)


def call_attention(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Compute attention through Transformers' interface to a kernel; there are no weights of it to return."""
    return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), None


AttentionInterface.register(FUSED, call_attention)
AttentionMaskInterface.register(FUSED, masking_utils.sdpa_mask)


def apply_quantized(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear layer whose matrix is quantized, in the type of autocast."""
    compute_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    out = QuantizedProduct.apply(x.to(compute_dtype), module)
    return out if module.bias is None else out + module.bias


def multiply_by_quantized(module: nn.Linear, gradient: torch.Tensor) -> torch.Tensor:
    """Return gradients (tokens, in) for (tokens, out) of a layer whose matrix is quantized."""
    return make_product(gradient, module, module.in_features)


class LayerTracer:
    """Hooks that count the forward and the backward pass of each layer as spans of their own."""

    def __init__(self, held: HeldBytes, offload: Offload | None, num_layers: int) -> None:
        self.held = held
        self.offload = offload
        self.num_layers = num_layers
        self.moved_bytes: list[int] = []  # offloaded in all when each layer begins, and when the last one ends

    def note_moved(self) -> None:
        """Note how many bytes have been offloaded so far."""
        self.moved_bytes.append(self.offload.moved_bytes if self.offload else 0)

    def trace_layer(self, layer: nn.Module, index: int, hooks: ExitStack) -> None:
        """Have a layer's passes counted until the stack of hooks is closed."""
        held = self.held

        def begin_forward(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # In any other span the layer is computed a second time.
            if held.name == ("forward", index - 1) or held.name == "embedding":
                held.begin(("forward", index))
                self.note_moved()
                if index == 0 and inputs and inputs[0].requires_grad:
                    inputs[0].register_hook(lambda gradient: held.begin("end"))

        def end_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            if held.name != ("forward", index):
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: held.begin(("backward", index)))
            if index == self.num_layers - 1:
                held.begin("head")

        hooks.callback(layer.register_forward_pre_hook(begin_forward).remove)
        hooks.callback(layer.register_forward_hook(end_forward).remove)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of a function that asks for numbers, or whose result takes no memory."""


def project(tile: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, bias: Any, *piece: Any) -> None:
    """Fill a tile of logits as a GPU does: it adds up in float32, and copies neither factor."""
    start, end, dtype = piece
    weight[start:end].to(dtype)


def can_group(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> bool:
    """Tell whether torch's grouped product takes the type on tensors without numbers; Transformers has another one."""
    return weight.dtype == torch.bfloat16


def drop_numbers(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Compute dropout as a GPU does."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


# What stands for parts of TRL's divergence on a GPU, where kernels work on the logits in place.
DIVERGENCE_ON_GPU = {"_project": project, "_stats_tile": nothing, "_backward_tile": nothing, "_addmm_fp32": nothing}


@contextmanager
def replace_kernels(held: HeldBytes, on_gpu: bool) -> Iterator[None]:
    """Replace, within the block, functions that a device computes otherwise than tensors without numbers do.

    - Attention: a fused kernel stores no scores.
    - TRL's loss goes through tokens and vocabulary in pieces of one size. Its loops take three of them.
    - On a GPU, TRL's loss: a kernel works on the logits in place, and products add up in float32.
    - On a CPU, TRL's loss keeps few logits, as in a training.
    - On a GPU, dropout: its mask takes a byte for each number.
    """
    attention = functools.partial(apply_attention, FlashAttention if on_gpu else FusedAttention)
    with ExitStack() as originals, take_rows_as_whole():
        on_both = (
            (nn.functional, "scaled_dot_product_attention", attention),
            (moe, "_can_use_grouped_mm", can_group),
            (chunked_logprob, "range", held.skip_alike),
            (chunked_divergence, "range", held.skip_alike),
            (trl_utils, "_use_triton", nothing),  # the LM head scores all positions that it gets
            (trl_utils, "_ChunkedLogProbFunction", chunked_logprob.ChunkedLogProbFunction if on_gpu else KeptLogits),
        )
        only_on_gpu = (
            (chunked_logprob, "_forward_tile", nothing),
            (chunked_logprob, "_backward_tile", nothing),
            (chunked_logprob, "_addmm_fp32", nothing),
            *((chunked_divergence, name, stand_in) for name, stand_in in DIVERGENCE_ON_GPU.items()),
            (nn.functional, "dropout", drop_numbers),
        )
        for owner, name, stand_in in (*on_both, *(only_on_gpu if on_gpu else ())):
            originals.callback(setattr, owner, name, getattr(owner, name, range))
            setattr(owner, name, stand_in)
        yield
