# SPDX-License-Identifier: Apache-2.0
"""How a job is made to fit its devices: the cheapest way whose estimate is below what is free, or what to change."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_world_size, world_size
from llm_trainer.common.units import GIB, show_bytes
from llm_trainer.config.rules import supports_fsdp
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device, find_free_memory
from llm_trainer.model.memory.estimate import Estimate, Setup, estimate_memory
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError, read_shape
from llm_trainer.model.memory.step_trace import Step
from llm_trainer.model.precision import choose_precision

GPU_SIZES_GIB = (16, 24, 32, 48, 80, 96, 141, 180)  # T4, L4/A10G, V100/5090, L40S, A100/H100, H20, H200, B200
ELSEWHERE = Device(torch.device("cuda"), "a GPU elsewhere", (9, 0))
ATTENTION_ELSEWHERE = "flash_attention_2"  # the image has it
USABLE_SHARE = 0.97  # of a GPU's nominal memory
MAX_WORLD_SIZE = 64
NUM_CHANGES = 3


@dataclass(frozen=True)
class Target:
    """The devices that a job runs on."""

    device: Device
    world_size: int
    free_bytes: int  # on each device, of those the least

    @property
    def on_gpu(self) -> bool:
        return self.device.is_gpu

    @property
    def unit(self) -> str:
        return "GPU" if self.on_gpu else "process"


@dataclass(frozen=True)
class ParallelismPlan:
    """How a model is spread over devices, and what is done to hold less of a step."""

    sharded: bool
    checkpoints: bool
    offloads: bool

    def name(self, world_size: int) -> str:
        spread = "FSDP" if self.sharded else "DDP" if world_size > 1 else "training"
        savings = ["gradient checkpointing"] * self.checkpoints + ["activation offloading"] * self.offloads
        return f"{spread} with {' and '.join(savings)}" if savings else spread


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen, and why."""

    distribution: Literal["ddp", "fsdp"]
    gradient_checkpointing: bool
    activation_offloading: bool
    estimate: Estimate | None  # None where the model's code cannot be run without numbers
    reason: str
    warning: str = ""
    shape: ModelShape | None = None  # of the model, where it is known

    @property
    def sharded(self) -> bool:
        return self.distribution == "fsdp"

    def describe(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "distribution": self.distribution,
            "gradient_checkpointing": self.gradient_checkpointing,
            "activation_offloading": self.activation_offloading,
            "reason": self.reason,
            "estimate": self.estimate.describe() if self.estimate else None,
        }

    def compare(self, measured_bytes: int, on_gpu: bool) -> dict[str, Any]:
        """The description with the peak that was measured beside the estimate of it."""
        comparison = f"measured peak {show_bytes(measured_bytes)}"
        if self.estimate:  # a CPU's resident set shows what the allocator holds too
            estimated_bytes = self.estimate.peak_bytes if on_gpu else self.estimate.total_bytes
            comparison = f"estimated {show_bytes(estimated_bytes)}, {comparison}"
        return {**self.describe(), "measured_peak_bytes": measured_bytes, "comparison": comparison}


@dataclass(frozen=True, eq=False)
class MemoryScenario:
    """A job as far as its memory depends on it: its changed copies are tried out too."""

    config: PreTrainedConfig
    settings: Settings
    longest_row: int  # tokens, uncut
    target: Target
    attention: str  # the kernel

    @functools.cached_property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the weights in memory, and of the computation."""
        settings, precision = self.settings, choose_precision(self.settings, self.target.device)
        compute = precision.compute
        if settings.is_given("bf16") or settings.is_given("fp16"):
            compute = (
                torch.bfloat16
                if settings.training.bf16
                else torch.float16
                if settings.training.fp16
                else precision.weights
            )
        return precision.weights, compute

    @functools.cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.config, self.settings, self.types[0])

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        settings = self.settings
        if settings.data.packing and settings.data.max_length:
            return settings.data.max_length
        length = min(settings.data.max_length or self.longest_row, self.longest_row)
        multiple = settings.data.pad_to_multiple_of
        return length + -length % (int(multiple) if str(multiple).isdigit() else 1)

    @property
    def has_mask(self) -> bool:
        """Whether the kernel is told by a mask which tokens a token sees; those of flash attention are not."""
        is_told_lengths = self.attention.startswith(("flash", "flex"))
        return not is_told_lengths and (
            self.settings.training.per_device_train_batch_size > 1 or bool(self.settings.data.packing)
        )

    def estimate(self, way: ParallelismPlan) -> Estimate:
        settings = self.settings
        step = Step(
            num_sequences=settings.training.per_device_train_batch_size,
            length=max(2, self.length),
            has_mask=self.has_mask,
            stores_scores=self.attention == "eager",
            compute_dtype=self.types[1],
            checkpoints=way.checkpoints,
            offloads=way.offloads,
            sharded=way.sharded,
            on_gpu=self.target.on_gpu,
        )
        accumulates = settings.training.gradient_accumulation_steps > 1
        return estimate_memory(self.shape, Setup(step, self.target.world_size, settings.training.optim, accumulates))

    def fits(self, need: Estimate) -> bool:
        return need.total_bytes <= self.target.free_bytes

    def change(self, **values: Any) -> "MemoryScenario":
        changed = replace(self, settings=self.settings.replace(**values))
        if not values.keys() & {"use_peft", "load_in_4bit", "torch_dtype"}:
            changed.__dict__["shape"] = self.shape  # which is dear, and stays the same
        return changed

    def move(self, **values: Any) -> "MemoryScenario":
        """The same job on other devices."""
        moved = replace(self, target=replace(self.target, **values))
        moved.__dict__["shape"] = self.shape
        return moved


def choose_memory_plan(
    config: PreTrainedConfig,
    settings: Settings,
    longest_row: int,
    target: Target,
    attention: str,
    earlier: str | None = None,
) -> MemoryPlan:
    """The cheapest way that fits, of those that the settings leave open. `longest_row` is in tokens.

    `earlier` is the distribution of a run that this one goes on from; where the settings leave it open, it stays.
    Raises UserError where none does, with the cheapest changes that make it fit; with `check_memory=false` the way that
    takes the least is tried.
    """
    if earlier and settings.parallelism.distribution == "auto" and target.world_size > 1:
        settings = settings.replace(distribution=earlier)
    case = MemoryScenario(config, settings, longest_row, target, attention)
    ways, free = list_parallelism_plans(settings, target), show_bytes(target.free_bytes)
    refused: list[str] = []
    for way in ways:
        try:
            need = case.estimate(way)
        except UnknownShapeError as error:
            return choose_without_estimate(ways, target, f"the model's memory is not known, since {error}")
        name, size = way.name(target.world_size), f"{show_bytes(need.total_bytes)} a {target.unit}"
        if case.fits(need):
            needs = f"{', '.join(refused) or f'{name} needs {size}'} and {free} are free"
            return build_memory_plan(way, need, f"{needs}: {name}, {size}" if refused else needs, shape=case.shape)
        refused.append(f"{name} needs {size}")
    problem = f"The job needs {size} with {name} and {free} are free"
    if not settings.parallelism.check_memory:
        warning = f"{problem}: it may run out of memory."
        return build_memory_plan(way, need, f"{problem}, and check_memory=false", warning, case.shape)
    changes = list(islice(list_changes(case), NUM_CHANGES))
    fix = f"what makes it fit: {'; or '.join(changes)}" if changes else "use a smaller model, or larger devices"
    raise UserError(f"{problem}; {fix}.")


def describe_memory_plan(fit: MemoryPlan) -> Iterator[str]:
    """Lines for the log."""
    yield f"Memory: {fit.reason}"
    yield from fit.estimate.as_table() if fit.estimate else ()
    if fit.warning:
        yield f"Warning: {fit.warning}"


def choose_without_estimate(ways: list[ParallelismPlan], target: Target, reason: str) -> MemoryPlan:
    """On a GPU the first way that recomputes activations, if there is one: most models need that there."""
    way = next((way for way in ways if way.checkpoints == target.on_gpu), ways[0])
    return build_memory_plan(way, None, reason, f"{reason[0].upper()}{reason[1:]}.")


def build_memory_plan(
    way: ParallelismPlan, need: Estimate | None, reason: str, warning: str = "", shape: ModelShape | None = None
) -> MemoryPlan:
    distribution: Literal["ddp", "fsdp"] = "fsdp" if way.sharded else "ddp"
    return MemoryPlan(distribution, way.checkpoints, way.offloads, need, reason, warning, shape)


def list_parallelism_plans(settings: Settings, target: Target) -> list[ParallelismPlan]:
    """The ways that the settings leave open, the cheapest first.

    Checkpointing computes each layer's forward pass twice, a third more work, and sends nothing. FSDP gathers all
    weights twice a step: with adapters, of which DDP sends next to nothing, that is the dearer one, much so between
    hosts, so that it comes second. Offloading sends activations over PCIe and back; it comes last, and on top of
    checkpointing, which leaves little to send.
    """
    open_ways = (False, True)
    spreads = open_ways if target.world_size > 1 and is_shardable(settings) else (False,)
    distribution = {"ddp": (False,), "fsdp": (True,), "auto": spreads}
    checkpointing, offloading = settings.parallelism.gradient_checkpointing, settings.parallelism.activation_offloading
    ways = product(
        open_ways if offloading is None and target.on_gpu else (bool(offloading),),
        distribution[settings.parallelism.distribution],
        open_ways if checkpointing is None else (checkpointing,),
    )
    return [
        ParallelismPlan(sharded, checkpoints, offloads)
        for offloads, sharded, checkpoints in ways
        if checkpoints or not offloads or offloading or checkpointing is False
    ]


def is_shardable(settings: Settings) -> bool:
    return supports_fsdp(settings.model, settings.adapter)


def estimate_on_one_gpu(
    config: PreTrainedConfig, settings: Settings, longest_row: int, attention: str
) -> dict[str, Estimate]:
    """What each way that the settings leave open needs on one GPU of today, wherever that is.

    Raises UnknownShapeError.
    """
    target = Target(ELSEWHERE, world_size=1, free_bytes=0)
    case = MemoryScenario(config, settings, longest_row, target, attention)
    ways = list_parallelism_plans(settings, target)
    return {
        way.name(1): case.estimate(way)
        for way in ways
        if settings.parallelism.activation_offloading or not way.offloads
    }


def find_smallest_gpu(need: Estimate) -> int | None:
    """The smallest usual size of a GPU's memory that holds this, in GiB."""
    return next((size for size in GPU_SIZES_GIB if need.total_bytes <= count_usable_bytes(size)), None)


def count_usable_bytes(size_gib: int) -> int:
    return int(USABLE_SHARE * size_gib * GIB)


def list_changes(case: MemoryScenario) -> Iterator[str]:
    """Sentences' ends that name what makes the job fit, tried out, the cheapest first: single changes, then several."""
    told: set[str] = set()
    for kind in CHANGES:
        for text, changed in kind(case):
            if fits_at_best(changed):
                told.add(text)
                yield text
                break
    for first in range(len(CHANGES)):
        texts, changed = [], case
        for kind in CHANGES[first:]:
            *_, strongest = [("", changed), *kind(changed)]
            texts += [strongest[0]] if strongest[0] else []
            changed = strongest[1]
            if fits_at_best(changed):
                break
        text = " and ".join(texts)
        if fits_at_best(changed) and text not in told:
            told.add(text)
            yield text


def fits_at_best(case: MemoryScenario) -> bool:
    """Whether the way that takes the least fits."""
    try:
        return case.fits(case.estimate(list_parallelism_plans(case.settings, case.target)[-1]))
    except UnknownShapeError:
        return False


def shrink_batch(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    """The same batches in smaller pieces."""
    rows, steps = case.settings.training.per_device_train_batch_size, case.settings.training.gradient_accumulation_steps
    while rows > 1:
        pieces = 2 if rows % 2 == 0 else rows
        rows, steps = rows // pieces, steps * pieces
        text = f"per_device_train_batch_size={rows} with gradient_accumulation_steps={steps}"
        yield text, case.change(per_device_train_batch_size=rows, gradient_accumulation_steps=steps)


def recompute_activations(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    if case.settings.parallelism.gradient_checkpointing is False:
        yield "gradient_checkpointing=true", case.change(gradient_checkpointing=True)


def use_fsdp(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    if case.settings.parallelism.distribution == "ddp" and case.target.world_size > 1 and is_shardable(case.settings):
        yield "distribution=fsdp", case.change(distribution="fsdp")


def use_small_optimizer(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    if case.target.on_gpu and case.settings.training.optim in ("adamw_torch", "adamw_torch_fused"):
        yield "optim=adamw_8bit", case.change(optim="adamw_8bit")


def halve_type(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    if case.types[0] == torch.float32:
        yield "torch_dtype=bfloat16", case.change(torch_dtype="bfloat16")


def quantize_base(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    if case.settings.adapter.use_peft and not case.shape.quantization and not case.shape.is_mxfp4:
        yield "load_in_4bit=true", case.change(load_in_4bit=True)


def train_adapter(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    if not case.settings.adapter.use_peft:
        yield "use_peft=true", case.change(use_peft=True)


def shorten_rows(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    length = case.length
    while length > 256:
        length //= 2
        yield f"max_length={length}", case.change(max_length=length)


def add_gpus(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    number = case.target.world_size
    while case.target.on_gpu and number < MAX_WORLD_SIZE and is_shardable(case.settings):
        number *= 2
        yield f"{number} such GPUs with distribution=fsdp", case.change(distribution="fsdp").move(world_size=number)


def enlarge_devices(case: MemoryScenario) -> Iterator[tuple[str, MemoryScenario]]:
    """Devices with more memory."""
    if not case.target.on_gpu:
        need = case.estimate(list_parallelism_plans(case.settings, case.target)[-1]).total_bytes
        yield f"a machine with {show_bytes(need)} free for each process", case.move(free_bytes=need)
        return
    for size in GPU_SIZES_GIB:
        if count_usable_bytes(size) > case.target.free_bytes:
            yield f"GPUs of {size} GiB", case.move(free_bytes=count_usable_bytes(size))


# What costs nothing of the result first, then time, then precision, then data, then money.
CHANGES: tuple[Callable[[MemoryScenario], Iterator[tuple[str, MemoryScenario]]], ...] = (
    shrink_batch,
    recompute_activations,
    use_fsdp,
    use_small_optimizer,
    halve_type,
    quantize_base,
    train_adapter,
    shorten_rows,
    add_gpus,
    enlarge_devices,
)


def find_target(device: Device, group: dist.ProcessGroup | None) -> Target:
    """This job's devices. Every rank must call this: all are told the least that is free on any.

    What is free on a GPU is measured when CUDA's context is there; the estimate counts a context too, which leaves that
    much, about 0.5 GiB, for what comes later, such as kernels that are loaded when they are first used.
    """
    free_bytes = find_free_memory(device) // (1 if device.is_gpu else local_world_size())
    if group is not None:
        least = torch.tensor(free_bytes)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        free_bytes = int(least)
    return Target(device, world_size(), free_bytes)
