# SPDX-License-Identifier: Apache-2.0
"""The changes that make a job fit its devices, each tried out before it is proposed."""

from collections.abc import Callable, Iterator

import torch

from llm_trainer.common.units import show_bytes
from llm_trainer.config.global_batch import PIECES, TOTALS, find_batch_problem
from llm_trainer.model.memory.estimate import CONTEXT_BYTES, Estimate
from llm_trainer.model.memory.gpus import read_gpus
from llm_trainer.model.memory.scenario import MemoryScenario, list_parallelism_plans
from llm_trainer.model.memory.shape import UnknownShapeError

MAX_WORLD_SIZE = 64
SHORTEST_ROW = 256  # in tokens; rows are not proposed to be shorter than half of this

Change = tuple[str, MemoryScenario]  # its words for a message, and the job with it


def find_smallest_gpu(need: Estimate) -> int | None:
    """Return the smallest usual size of a GPU's memory that holds this, in GB as it is sold, or None."""
    return next((size for size in list_gpu_sizes() if need.total_bytes <= count_usable_bytes(size)), None)


def list_gpu_sizes() -> list[int]:
    """Return the usual sizes of a GPU's memory in GB, as it is sold."""
    return sorted({gpu.size_gb for gpu in read_gpus().values()})


def count_usable_bytes(size_gb: int) -> int:
    """Return the bytes that a process can use on any GPU that is sold with this memory."""
    return min(gpu.memory_bytes for gpu in read_gpus().values() if gpu.size_gb == size_gb) - CONTEXT_BYTES


def list_remedies(scenario: MemoryScenario) -> Iterator[str]:
    """Yield words for changes that make the job fit, the cheapest first: single changes, then several at once."""
    told: set[str] = set()
    for kind in CHANGES:
        fitting = (text for text, changed in kind(scenario) if fits_at_best(changed))
        if text := next(fitting, ""):
            told.add(text)
            yield text
    for first in range(len(CHANGES)):
        text, changed = combine_changes(scenario, CHANGES[first:])
        if fits_at_best(changed) and text not in told:
            told.add(text)
            yield text


def combine_changes(scenario: MemoryScenario, kinds: "tuple[ChangeKind, ...]") -> Change:
    """Apply the strongest change of each kind, one after the other, until the job fits."""
    texts, changed = [], scenario
    for kind in kinds:
        *_, (text, changed) = [("", changed), *kind(changed)]
        texts += [text] if text else []
        if fits_at_best(changed):
            break
    return " and ".join(texts), changed


def fits_at_best(scenario: MemoryScenario) -> bool:
    """Tell whether the job fits in the way that takes the least memory."""
    try:
        return scenario.can_hold(estimate_at_best(scenario))
    except UnknownShapeError:
        return False


def estimate_at_best(scenario: MemoryScenario) -> Estimate:
    """Return what each device needs in the way that takes the least memory. Raise UnknownShapeError."""
    return scenario.estimate(list_parallelism_plans(scenario.settings, scenario.target)[-1])


def shrink_batch(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the same batches in smaller pieces."""
    training = scenario.settings.training
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    while rows > 1:
        pieces = 2 if rows % 2 == 0 else rows
        rows, steps = rows // pieces, steps * pieces
        changed = dict(zip(PIECES, (rows, steps), strict=True))
        # A global batch derives the piece that is not given.
        told = [name for name in PIECES if training.is_given(name) or not training.is_given(*TOTALS)]
        text = " with ".join(f"{name}={changed[name]}" for name in told or PIECES[:1])
        yield text, scenario.replace_settings(**changed)


def recompute_activations(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job with gradient checkpointing, where it is switched off."""
    if scenario.settings.parallelism.gradient_checkpointing is False:
        yield "gradient_checkpointing=true", scenario.replace_settings(gradient_checkpointing=True)


def use_fsdp(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job with a sharded model, where DDP is asked for."""
    settings = scenario.settings
    if settings.parallelism.distribution == "ddp" and scenario.target.world_size > 1 and settings.can_shard:
        yield "distribution=fsdp", scenario.replace_settings(distribution="fsdp")


def use_small_optimizer(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job with an optimizer in 8 bit, on a GPU."""
    if scenario.target.on_gpu and scenario.settings.training.optim in ("adamw_torch", "adamw_torch_fused"):
        yield "optim=adamw_8bit", scenario.replace_settings(optim="adamw_8bit")


def halve_type(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job with weights in 16 bit, where they take 32."""
    if scenario.dtypes[0] == torch.float32:
        yield "torch_dtype=bfloat16", scenario.replace_settings(torch_dtype="bfloat16")


def quantize_base(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job on a base in 4 bit, where an adapter is trained on one that is not quantized."""
    is_whole = scenario.shape.quantization in (None, "fp8")
    if scenario.settings.adapter.use_peft and is_whole and not scenario.shape.is_mxfp4:
        in_place = " in place of base_compute=fp8" if scenario.settings.model.base_compute else ""
        yield f"load_in_4bit=true{in_place}", scenario.replace_settings(load_in_4bit=True, base_compute=None)


def train_adapter(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job with an adapter, where all weights are trained."""
    if not scenario.settings.adapter.use_peft:
        yield "use_peft=true", scenario.replace_settings(use_peft=True)


def shorten_rows(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job with rows of half the length, again and again."""
    length = scenario.length
    while length > SHORTEST_ROW:
        length //= 2
        yield f"max_length={length}", scenario.replace_settings(max_length=length)


def add_gpus(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job sharded over twice as many GPUs, again and again."""
    num_gpus, settings = scenario.target.world_size, scenario.settings
    while scenario.target.on_gpu and num_gpus < MAX_WORLD_SIZE and settings.can_shard:
        num_gpus *= 2
        if any(find_batch_problem(settings.training, settings.data, num_gpus)):
            return
        sharded = scenario.replace_settings(distribution="fsdp")
        yield f"{num_gpus} such GPUs with distribution=fsdp", sharded.replace_target(world_size=num_gpus)


def enlarge_devices(scenario: MemoryScenario) -> Iterator[Change]:
    """Yield the job on devices with more memory."""
    if not scenario.target.on_gpu:
        need = estimate_at_best(scenario).total_bytes
        text = f"a machine with {show_bytes(need)} free for each process"
        yield text, scenario.replace_target(free_bytes=need)
        return
    for size in list_gpu_sizes():
        if count_usable_bytes(size) > scenario.target.free_bytes:
            yield f"GPUs of {size} GB", scenario.replace_target(free_bytes=count_usable_bytes(size))


# In the order of their price: first what leaves the result as it is, then time, precision, data, and money.
ChangeKind = Callable[[MemoryScenario], Iterator[Change]]
CHANGES: tuple[ChangeKind, ...] = (
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
