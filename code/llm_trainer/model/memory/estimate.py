# SPDX-License-Identifier: Apache-2.0
"""The memory that training takes on each device, in named parts, from the model's shape and a traced step."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llm_trainer.common.units import GIB, MIB
from llm_trainer.model.memory.batch import Batch
from llm_trainer.model.memory.passes import (
    Pass,
    Peak,
    Unit,
    add_tower,
    count_gathered_bytes,
    find_peak,
    list_passes,
    weigh_tower,
)
from llm_trainer.model.memory.shape import ModelShape
from llm_trainer.model.memory.step_trace import Step, trace_step
from llm_trainer.model.memory.tower_trace import trace_tower

# The workspace that torch gives cuBLAS on Hopper, the largest of all GPUs (aten/src/ATen/cuda/CUDABlas.cpp).
CUBLAS_WORKSPACE_BYTES = 32 * MIB
# A process takes these beside what torch allocates: CUDA's context with the loaded kernels, and NCCL's channels.
CONTEXT_BYTES = 600 * MIB
NCCL_BYTES = 400 * MIB
# This share lies unused between blocks of torch's allocator at the peak.
FRAGMENTED_SHARE = 0.04
# glibc's malloc holds this share beside the tensors that are alive. Measured were 0.27 to 0.6 (bench/memory.py).
MALLOC_SHARE = 0.3
# Bytes that an optimizer keeps for each trained weight. Those not listed keep two numbers of the weight's own type.
STATE_BYTES = {"adamw_torch_4bit": 1, "sgd": 0, "lomo": 0, "adalomo": 0}
SINGLE_STATE = ("lion", "rmsprop", "adagrad", "schedule_free_sgd")
TRIPLE_STATE = ("ademamix",)


@dataclass(frozen=True)
class Setup:
    """Setting of a step: its devices, and the optimizer that updates the weights after it."""

    step: Step
    world_size: int
    optimizer: str  # one of transformers' OptimizerNames
    accumulates: bool  # whether gradients of earlier batches are there when a step begins
    kept_layers: int = 0  # the last so many layers keep their activations where others are recomputed
    evaluated: Batch | None = None  # the batch of evaluations between steps; None where there are none
    copies_adapter: bool = False  # whether a reference has a frozen copy of the adapter
    teacher: ModelShape | None = None  # that reads each batch first, and is on each device as a whole
    cache_bytes: int = 0  # keys and values of the completions that the model writes between steps
    pixel_bytes: int = 0  # of images that are on the device, for this batch and for others


@dataclass(frozen=True)
class Estimate:
    """Memory that each device holds at the peak of a step."""

    parts: dict[str, int]  # name -> bytes that torch allocates
    fixed: dict[str, int]  # what a process takes beside them
    host_bytes: int  # activations of a device that wait in the host's memory

    @property
    def peak_bytes(self) -> int:
        """The bytes that torch allocates at the peak."""
        return sum(self.parts.values())

    @property
    def total_bytes(self) -> int:
        """The bytes that the process takes at the peak."""
        return self.peak_bytes + sum(self.fixed.values())

    def describe(self) -> dict[str, Any]:
        """Return the estimate as values of JSON."""
        return {"peak_bytes": self.peak_bytes, "total_bytes": self.total_bytes, "parts": {**self.parts, **self.fixed}}

    def as_table(self) -> Iterator[str]:
        """Yield lines for the log: the parts of at least 1 MiB, and their sum."""
        for name, size in {**self.parts, **self.fixed}.items():
            if size >= MIB:
                yield f"  {name:22} {size / GIB:8.2f} GiB"
        yield f"  {'in all':22} {self.total_bytes / GIB:8.2f} GiB"


def estimate_memory(shape: ModelShape, setup: Setup) -> Estimate:
    """Return what a device needs for a step and the update after it. Raise UnknownShapeError."""
    if not setup.step.sharded:  # the number of copies makes no difference
        setup = replace(setup, world_size=min(setup.world_size, 2))
    return estimate_parts(shape, setup)


@functools.lru_cache(maxsize=4096)
def estimate_parts(shape: ModelShape, setup: Setup) -> Estimate:
    """Return the same, which `plan` asks for on hundreds of numbers of GPUs."""
    step = setup.step
    trace = trace_step(shape, step)
    kept = trace_step(shape, replace(step, recompute_activations=False)) if setup.kept_layers else trace
    shards = setup.world_size if step.sharded else 1
    passes = list_passes(shape, step, setup.world_size, (trace, kept), setup.kept_layers)
    passes = see_images(passes, shape, step, setup)
    moments = [find_step_or_update_peak(shape, passes, setup), find_evaluation_peak(shape, setup)]
    moments += find_other_peaks(shape, setup)
    peak = max(moments, key=lambda moment: moment.total)
    is_replicated = setup.world_size > 1 and not step.sharded
    parts = {
        "base weights": sum(count_stored_bytes(shape, shards, in_adapter=False)),
        "adapter": sum(count_stored_bytes(shape, shards, in_adapter=True)),
        "reference's adapter": sum(count_stored_bytes(shape, shards, in_adapter=True)) if setup.copies_adapter else 0,
        "teacher": setup.teacher.count_bytes() if setup.teacher else 0,
        "teacher's states": count_taught_bytes(setup),
        "pixels": setup.pixel_bytes,
        "gathered weights": peak.gathered,
        "reduced gradients": peak.reduced,
        "gradients": peak.gradients,
        "optimizer": count_optimizer_states(shape, setup.optimizer) // shards,
        "DDP's buckets": shape.trained_bytes if is_replicated else 0,
        "activations": peak.activations,
        "working memory": peak.working,
        "cuBLAS": CUBLAS_WORKSPACE_BYTES if step.on_gpu else 0,
    }
    host_bytes = sum(trace.offloaded[kind] for kind in shape.kinds)
    return Estimate(parts, count_process_bytes(setup, sum(parts.values())), host_bytes)


def count_process_bytes(setup: Setup, peak_bytes: int) -> dict[str, int]:
    """Return the bytes that a process takes beside the peak of torch's allocations, by name."""
    if not setup.step.on_gpu:
        return {"malloc": round(MALLOC_SHARE * peak_bytes)}
    return {
        "fragments": round(FRAGMENTED_SHARE * peak_bytes),
        "CUDA": CONTEXT_BYTES,
        "NCCL": NCCL_BYTES if setup.world_size > 1 else 0,
    }


def find_step_or_update_peak(shape: ModelShape, passes: list[Pass], setup: Setup) -> Peak:
    """Return the peak of the step or of the update after it. At the update all gradients are there, and nothing else.

    The plain AdamW computes all updates before it makes any.
    """
    gradients = shape.trained_bytes // (setup.world_size if setup.step.sharded else 1)
    update = Peak(gradients, working=gradients if setup.optimizer == "adamw_torch" else 0)
    peak = find_peak(passes, gradients if setup.accumulates else 0)
    return max(peak, update, key=lambda moment: moment.total)


def find_evaluation_peak(shape: ModelShape, setup: Setup) -> Peak:
    """Return the peak of an evaluation between two steps, when there are no gradients.

    A layer leaves nothing but weights that autocast has cast.
    """
    batch = setup.evaluated
    if batch is None:
        return Peak()
    step = replace(setup.step, num_sequences=batch.num_sequences, length=batch.length, num_scored=batch.num_scored)
    step = replace(step, trains=False, recompute_activations=False)
    return find_peak(see_images(list_forward(shape, step, setup.world_size), shape, step, setup), accumulated=0)


def find_other_peaks(shape: ModelShape, setup: Setup) -> Iterator[Peak]:
    """Yield the peaks that some methods have outside of steps: a teacher's, and of writing completions."""
    if setup.teacher:
        yield find_teacher_peak(setup.teacher, shape, setup)
    if setup.cache_bytes:
        yield find_generation_peak(shape, setup)


def find_teacher_peak(teacher: ModelShape, shape: ModelShape, setup: Setup) -> Peak:
    """Return the peak of a teacher that reads a batch before the student does, or the larger one of an evaluation.

    Gradients of earlier batches are there where steps accumulate. Its output layer computes with the student's.
    """
    batch = setup.evaluated or Batch(0, 0)
    num_sequences = max(setup.step.num_sequences, batch.num_sequences)
    step = replace(setup.step, num_sequences=num_sequences, num_scored=None, teacher_width=None, sharded=False)
    step = replace(step, fused_kernels=frozenset(), images=None)
    gradients = shape.trained_bytes // (setup.world_size if setup.step.sharded else 1)
    return find_peak(list_forward(teacher, step, 1)[:-1], gradients if setup.accumulates else 0)


def list_forward(shape: ModelShape, step: Step, world_size: int) -> list[Pass]:
    """Return the passes of a model that reads a batch without gradients. The last one is the output layer's."""
    step = replace(step, trains=False, recompute_activations=False)
    trace = trace_step(shape, replace(step, offload_activations=False))
    passes = list_passes(shape, step, world_size, (trace, trace), 0)
    return [replace(each, unit=Unit()) for each in passes[: shape.num_layers + 2]]


def see_images(passes: list[Pass], shape: ModelShape, step: Step, setup: Setup) -> list[Pass]:
    """Return the passes of a step or an evaluation with those of its images through the tower, where it has some."""
    tower = trace_tower(shape, step, setup.accumulates)
    return add_tower(passes, tower, weigh_tower(shape, step, setup.world_size)) if tower else passes


def count_taught_bytes(setup: Setup) -> int:
    """Return the bytes of a teacher's last hidden states at the tokens that are learnt, which a step keeps."""
    step = setup.step
    return step.find_num_scored() * (step.teacher_width or 0) * step.compute_dtype.itemsize


def find_generation_peak(shape: ModelShape, setup: Setup) -> Peak:
    """Return the peak of writing completions: the cache, and beside it a copy of one layer's part, which grows.

    Gradients of earlier batches are there where steps accumulate. Of a sharded model each device then has all weights.
    """
    step, shards = setup.step, setup.world_size if setup.step.sharded else 1
    growing = 2 * setup.cache_bytes // shape.num_layers
    gradients = shape.trained_bytes // shards if setup.accumulates else 0
    whole = count_gathered_bytes([*shape.parts], step.compute_dtype, shards) if step.sharded else 0
    return Peak(gradients, working=setup.cache_bytes + growing, gathered=whole)


def count_stored_bytes(shape: ModelShape, shards: int, *, in_adapter: bool) -> Iterator[int]:
    """Yield the bytes of a device's shards of parts that are alike.

    Scales of quantized weights are no parameters, and stay whole.
    """
    for (role, data_bytes, scales_bytes), number in shape.alike_parts.items():
        if (role == "adapter") == in_adapter:
            yield number * (-(-data_bytes // shards) + scales_bytes)


def count_optimizer_states(shape: ModelShape, optimizer: str) -> int:
    """Return the bytes of an optimizer's states for all trained weights, by the optimizer's name in Transformers."""
    if optimizer.startswith("paged_"):
        return 0  # they lie in the host's memory when there is no room
    if optimizer == "adafactor" or optimizer == "galore_adafactor":
        return sum(part.factored_bytes for part in shape.parts)
    copies = 1 if optimizer.startswith(SINGLE_STATE) else 3 if optimizer.startswith(TRIPLE_STATE) else 2
    if optimizer in STATE_BYTES:
        return STATE_BYTES[optimizer] * shape.num_trained
    if "8bit" in optimizer:
        return copies * shape.num_trained
    return copies * shape.trained_bytes
