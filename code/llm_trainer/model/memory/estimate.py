# SPDX-License-Identifier: Apache-2.0
"""The memory that training takes on each device, in named parts: the model's shape, and a step of it, in bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llm_trainer.common.units import GIB, MIB
from llm_trainer.model.memory.shape import ModelShape, Part
from llm_trainer.model.memory.step_trace import Span, Step, StepTrace, trace_step

# cuBLAS' workspace as torch asks for it on Hopper (aten/src/ATen/cuda/CUDABlas.cpp), the largest of all.
CUBLAS_WORKSPACE_BYTES = 32 * MIB
# Of a process, beside what torch allocates: CUDA's context with the kernels that are loaded, and NCCL's channels.
CONTEXT_BYTES = 600 * MIB
NCCL_BYTES = 400 * MIB
# What lies unused between blocks of torch's allocator at the peak.
FRAGMENTED_SHARE = 0.04
# What glibc's malloc holds beside the tensors that are alive: measured, from 0.27 to 0.6 (bench/memory.py).
MALLOC_SHARE = 0.3
# Numbers that an optimizer keeps of a weight, in bytes; those not listed keep two of the weight's own type.
STATE_BYTES = {"adamw_torch_4bit": 1, "sgd": 0, "lomo": 0, "adalomo": 0}
SINGLE_STATE = ("lion", "rmsprop", "adagrad", "schedule_free_sgd")
TRIPLE_STATE = ("ademamix",)


@dataclass(frozen=True)
class Setup:
    """How a step is spread over devices, and what updates the weights after it."""

    step: Step
    world_size: int
    optimizer: str  # one of transformers' OptimizerNames
    accumulates: bool  # gradients are there when a step begins


@dataclass(frozen=True)
class Estimate:
    """What each device holds at the peak of a step."""

    parts: dict[str, int]  # name -> bytes that torch allocates
    fixed: dict[str, int]  # what a process takes beside them
    host_bytes: int  # of activations that wait in the host's memory, a device's share

    @property
    def peak_bytes(self) -> int:
        """What torch allocates at the peak."""
        return sum(self.parts.values())

    @property
    def total_bytes(self) -> int:
        return self.peak_bytes + sum(self.fixed.values())

    def describe(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"peak_bytes": self.peak_bytes, "total_bytes": self.total_bytes, "parts": {**self.parts, **self.fixed}}

    def as_table(self) -> Iterator[str]:
        for name, size in {**self.parts, **self.fixed}.items():
            if size >= MIB:
                yield f"  {name:22} {size / GIB:8.2f} GiB"
        yield f"  {'in all':22} {self.total_bytes / GIB:8.2f} GiB"


def estimate_memory(shape: ModelShape, setup: Setup) -> Estimate:
    """What a device needs for a step and the update after it."""
    trace = trace_step(shape, setup.step)
    shards = setup.world_size if setup.step.sharded else 1
    weights = {
        "base weights": sum(count_stored_bytes(part, shards) for part in shape.parts if part.role != "adapter"),
        "adapter": sum(count_stored_bytes(part, shards) for part in shape.parts if part.role == "adapter"),
        "gathered weights": count_gathered_weights(shape, setup.step) if setup.step.sharded else 0,
    }
    optimizer = count_optimizer_states(shape, setup.optimizer) // shards
    gradients, activations, working = find_peak(shape, trace, shards, setup.accumulates)
    update = shape.trained_bytes // shards  # at the update there are all gradients, and nothing of the step
    scratch = update if setup.optimizer == "adamw_torch" else 0  # the plain one computes all updates before any is made
    if gradients + activations + working < update + scratch:
        gradients, activations, working = update, 0, scratch
    is_replicated = setup.world_size > 1 and not setup.step.sharded
    parts = {
        **weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "DDP's buckets": shape.trained_bytes if is_replicated else 0,
        "activations": activations,
        "working memory": working,
        "cuBLAS": CUBLAS_WORKSPACE_BYTES if setup.step.on_gpu else 0,
    }
    peak = sum(parts.values())
    fixed = {
        "fragments": round(FRAGMENTED_SHARE * peak),
        "CUDA": CONTEXT_BYTES,
        "NCCL": NCCL_BYTES if setup.world_size > 1 else 0,
    }
    host_bytes = sum(trace.offloaded[kind] for kind in shape.kinds)
    return Estimate(parts, fixed if setup.step.on_gpu else {"malloc": round(MALLOC_SHARE * peak)}, host_bytes)


def count_stored_bytes(part: Part, shards: int) -> int:
    """A device's part of some weights; the scales of quantized ones are no parameters, and stay whole."""
    return -(-part.data_bytes // shards) + part.scales_bytes


def count_gathered_weights(shape: ModelShape, step: Step) -> int:
    """Weights that FSDP2 has gathered at once: a layer, the next one, and the last module with what is in no layer.

    The output layer stays from the forward to the backward pass (accelerate's fsdp2_prepare_model).
    """
    layers = sorted(count_gathered_bytes(layer, step.compute_dtype) for layer in shape.list_layers())
    return sum(layers[-2:]) + count_gathered_bytes(
        [part for part in shape.parts if part.layer is None], step.compute_dtype
    )


def count_gathered_bytes(parts: list[Part], compute_dtype: torch.dtype) -> int:
    """Weights as FSDP2 gathers them: in the type of the computation where they are not quantized."""
    return sum(part.data_bytes if part.scales_bytes else part.num_weights * compute_dtype.itemsize for part in parts)


def count_optimizer_states(shape: ModelShape, optimizer: str) -> int:
    """The optimizer's states; those of a paged one lie in the host's memory when there is no room."""
    if optimizer.startswith("paged_"):
        return 0
    if optimizer == "adafactor" or optimizer == "galore_adafactor":
        return sum(part.factored_bytes for part in shape.parts)
    copies = 1 if optimizer.startswith(SINGLE_STATE) else 3 if optimizer.startswith(TRIPLE_STATE) else 2
    if optimizer in STATE_BYTES:
        return STATE_BYTES[optimizer] * shape.num_trained
    if "8bit" in optimizer:
        return copies * shape.num_trained
    return copies * shape.trained_bytes


def find_peak(shape: ModelShape, trace: StepTrace, shards: int, accumulates: bool) -> tuple[int, int, int]:
    """(gradients, activations, working memory) at the moment of a step at which they are most.

    The trace's layers stand for all layers of their kind. What a span leaves behind in its backward pass includes its
    gradients, of which a device keeps a shard; where gradients accumulate, they are all there from the beginning.
    """
    layer_gradients = [sum(part.trained_bytes for part in layer) for layer in shape.list_layers()]
    passes: list[tuple[Span, int]] = [(trace.embedding, 0)]
    passes += [(trace.forward[kind], 0) for kind in shape.kinds]
    passes += [(trace.head, max(0, trace.head.net))]
    passes += [(trace.backward[kind], layer_gradients[number]) for number, kind in enumerate(shape.kinds)][::-1]
    passes += [(trace.end, max(0, trace.end.net))]
    gradients = shape.trained_bytes // shards if accumulates else 0
    held = 0
    peak = (gradients, 0, 0)
    for span, new_gradients in passes:
        if gradients + held + span.peak > sum(peak):
            peak = gradients, held, span.peak
        held += span.net - new_gradients
        gradients += 0 if accumulates else new_gradients // shards
    return peak
