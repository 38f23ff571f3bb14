# SPDX-License-Identifier: Apache-2.0
"""What a step takes on 1 to 512 GPUs, on paper: time, memory, network and checkpoints; the tables of bench/scaling.md.

    .venv/bin/python bench/scaling.py

Shapes, operations and memory are this project's own (model_shape, flops, fit), the traffic is that of torch's DDP and
FSDP2, the time of a collective NCCL's own model of a ring. scaling.md says what is assumed and what was measured.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from llm_trainer.common.units import GIB
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.liger import KERNELS
from llm_trainer.model.memory.estimate import count_optimizer_states
from llm_trainer.model.memory.fit import keep_layers
from llm_trainer.model.memory.flops import count_attention, count_flops, find_peak_flops
from llm_trainer.model.memory.passes import count_gathered_bytes
from llm_trainer.model.memory.remedies import count_usable_bytes
from llm_trainer.model.memory.scenario import (
    MemoryScenario,
    MemorySettings,
    Target,
    list_parallelism_plans,
)
from llm_trainer.model.memory.shape import ModelShape, Part

ROW_TOKENS = 4096  # packed, one row a GPU at a time
ROWS_A_STEP = 64  # kept by gradient_accumulation_steps up to as many GPUs
EFFICIENCY = 0.45  # of a GPU's peak, of all operations, those computed a second time included
BANDWIDTH_SHARE = 0.8  # of what a link or a network is rated at
BUCKET_BYTES = 25 * 2**20  # DDP's: the last one is reduced when nothing is left to compute
UNPACKED_BYTES = 2.5  # of a 4-bit weight, half a byte is read and two are written before it multiplies
UPDATE_BYTES = 28  # AdamW reads weight, gradient and two states of 4 bytes, and writes all but the gradient
# NCCL's model of a ring (src/graph/tuning.cc): the start, a hop over NVLink, PCIe, the network; in seconds.
BULK = {"start": 8.4e-6, "nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 9.6e-6}  # protocol Simple
SMALL = {"start": 3.6e-6, "nvlink": 0.5e-6, "pcie": 1.0e-6, "network": 2.7e-6}  # protocol LL
SMALL_A_STEP = 2  # collectives of a few numbers: the tokens of a step, and the gradients' norm
DISK_BYTES_A_SECOND = 2e9  # of a host, at which a checkpoint is written and read again for its digests


@dataclass(frozen=True)
class Machine:
    """An instance with eight GPUs; bandwidths are one way, in bytes a second."""

    name: str
    gpu: str  # as CUDA names it
    memory_gib: int
    memory_bandwidth: float
    link: str  # between its GPUs
    link_bandwidth: float  # of a GPU
    network_bandwidth: float  # of the host
    gpus: int = 8


P5 = Machine("p5.48xlarge", "NVIDIA H100 80GB HBM3", 80, 3.35e12, "nvlink", 450e9, 400e9)
P4D = Machine("p4d.24xlarge", "NVIDIA A100-SXM4-40GB", 40, 1.555e12, "nvlink", 300e9, 50e9)
G6E = Machine("g6e.48xlarge", "NVIDIA L40S", 48, 0.864e12, "pcie", 32e9, 50e9)
G5 = Machine("g5.48xlarge", "NVIDIA A10G", 24, 0.6e12, "pcie", 32e9, 12.5e9)

HEADER = (
    "| GPUs | memory, GiB | recomputes | accumulates | step, s | tokens/s | efficiency (no overlap) | network, GB "
    "| checkpoint, GB, s |"
)
LLAMA_3B = LlamaConfig(
    vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip
MODELS = {"3B": LLAMA_3B, "8B": LLAMA_8B, "70B": LLAMA_70B}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_r": 16, "lora_dropout": 0.0},
    "QLoRA": {"lora_r": 16, "lora_dropout": 0.0, "load_in_4bit": True},
    "all weights": {"use_peft": False},
}
SIZES = (1, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Scenario:
    model: str
    method: str
    distribution: str
    machine: Machine
    within_host: bool = False  # sharded over the GPUs of a host, and replicated over hosts

    @property
    def title(self) -> str:
        spread = self.distribution.upper() + (" within a host" if self.within_host else "")
        return f"{self.model}, {self.method}, {spread}, {self.machine.name}"


SCENARIOS = (
    Scenario("8B", "LoRA", "ddp", P5),
    Scenario("8B", "LoRA", "ddp", P4D),
    Scenario("8B", "LoRA", "ddp", G6E),
    Scenario("8B", "QLoRA", "ddp", G5),
    Scenario("70B", "LoRA", "fsdp", P5),
    Scenario("70B", "LoRA", "fsdp", P4D),
    Scenario("70B", "LoRA", "fsdp", P5, within_host=True),
    Scenario("70B", "QLoRA", "ddp", P5),
    Scenario("70B", "QLoRA", "fsdp", P4D),
    Scenario("70B", "all weights", "fsdp", P5),
    Scenario("3B", "all weights", "ddp", P5),
    Scenario("3B", "all weights", "fsdp", P5),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a batch has summed or gathered; of each a ring sends (ranks - 1) / ranks from every rank."""

    gathered: int  # weights, in the forward pass
    gathered_again: int  # and in the backward pass
    reduced: int  # gradients; an all-reduce is two passes, a reduce-scatter one
    units: int  # modules that are gathered as one, in the forward pass
    units_again: int  # and in the backward pass
    buckets: int  # of gradients that are reduced as one


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    gpus: int
    pieces: int  # gradient_accumulation_steps
    recomputed_layers: int
    num_layers: int
    memory_bytes: int  # of a GPU
    fits: bool
    compute_seconds: float
    waiting_seconds: float  # where traffic goes on while a GPU computes
    traffic_seconds: float  # which it would wait if nothing did
    network_bytes: float  # sent by a host in a step
    checkpoint_bytes: int  # of all hosts
    writing_hosts: int

    @property
    def recomputed(self) -> str:
        """The layers that are recomputed, in words."""
        some = f"{self.recomputed_layers} of {self.num_layers} layers"
        return {0: "no", self.num_layers: "all"}.get(self.recomputed_layers, some)

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.waiting_seconds

    @property
    def efficiencies(self) -> tuple[float, float]:
        """The share of the time in which a GPU computes: as it is, and if no traffic went on meanwhile."""
        waiting = self.waiting_seconds, self.traffic_seconds
        return tuple(self.compute_seconds / (self.compute_seconds + seconds) for seconds in waiting)

    @property
    def tokens_per_second(self) -> float:
        return self.gpus * self.pieces * ROW_TOKENS / self.step_seconds

    @property
    def checkpoint_seconds(self) -> float:
        return self.checkpoint_bytes / self.writing_hosts / DISK_BYTES_A_SECOND


def main() -> None:
    print(render())


def render() -> str:
    return "\n".join(line for scenario in SCENARIOS for line in render_table(scenario))


def render_table(scenario: Scenario) -> Iterator[str]:
    yield f"### {scenario.title}"
    yield ""
    yield HEADER
    yield "|---" * HEADER.count(" |") + "|"
    for row in list_rows(scenario):
        memory = f"| {row.gpus} | {row.memory_bytes / GIB:.1f}"
        if not row.fits:
            yield f"{memory} | does not fit | | | | | | |"
            continue
        overlapped, serial = row.efficiencies
        yield (
            f"{memory} | {row.recomputed} | {row.pieces} | {row.step_seconds:.2f} "
            f"| {row.tokens_per_second:,.0f} | {overlapped:.1%} ({serial:.1%}) | {row.network_bytes / 1e9:.3g} "
            f"| {row.checkpoint_bytes / 1e9:.3g}, {row.checkpoint_seconds:.1f} |"
        )
    yield ""


def list_rows(scenario: Scenario) -> Iterator[Row]:
    machine, base = scenario.machine, build_case(scenario.model, scenario.method)
    device = Device(torch.device("cuda"), machine.gpu, (8, 0))
    on_machine = base.replace_settings(distribution=scenario.distribution).replace_target(
        device=device, free_bytes=count_usable_bytes(machine.memory_gib)
    )
    for gpus in SIZES:
        if gpus >= machine.gpus or scenario.distribution == "ddp":
            shards = machine.gpus if scenario.within_host else gpus
            pieces = max(1, ROWS_A_STEP // gpus)
            yield compute_row(
                scenario,
                on_machine.replace_settings(gradient_accumulation_steps=pieces).replace_target(world_size=shards),
                gpus,
            )


@functools.cache
def build_case(model: str, method: str) -> MemoryScenario:
    """A job of one row at a time, on no machine yet. Its shape, which is dear, serves all."""
    settings = Settings(packing=True, max_length=ROW_TOKENS, per_device_train_batch_size=1, **METHODS[method])
    sections = MemorySettings(settings.model, settings.adapter, settings.data, settings.training, settings.parallelism)
    target = Target(Device(torch.device("cuda"), P5.gpu, (8, 0)), world_size=1, free_bytes=0)
    return MemoryScenario(MODELS[model], sections, ROW_TOKENS, target, "flash_attention_2", frozenset(KERNELS))


def compute_row(scenario: Scenario, case: MemoryScenario, gpus: int) -> Row:
    """A job whose model, if it is sharded, is so over the case's GPUs, and replicated over the others."""
    machine, shape, pieces = scenario.machine, case.shape, case.settings.training.gradient_accumulation_steps
    needs = [
        keep_layers(case, way)
        for way in list_parallelism_plans(case.settings, case.target)
        if not way.offload_activations
    ]
    way, need = next(((way, need) for way, need in needs if case.can_hold(need)), needs[-1])
    shards = case.target.world_size if way.sharded else 1
    traffic = count_traffic(shape, case.dtypes[1], shards)
    recomputed = shape.num_layers - way.kept_layers if way.recompute_activations else 0
    forward, backward = time_batch(machine, case, recomputed / shape.num_layers)
    waiting, everything = time_waits(machine, traffic, (gpus, shards, pieces), forward, backward)
    update = UPDATE_BYTES * shape.num_trained / shards / machine.memory_bandwidth
    return Row(
        gpus=gpus,
        pieces=pieces,
        recomputed_layers=recomputed,
        num_layers=shape.num_layers,
        memory_bytes=need.total_bytes,
        fits=case.can_hold(need),
        compute_seconds=pieces * (forward + backward) + update,
        waiting_seconds=waiting,
        traffic_seconds=everything,
        network_bytes=count_network_bytes(machine, traffic, gpus, shards, pieces),
        checkpoint_bytes=shape.trained_bytes + count_optimizer_states(shape, case.settings.training.optim),
        writing_hosts=count_hosts(machine, shards),
    )


def count_traffic(shape: ModelShape, compute_dtype: torch.dtype, shards: int) -> Traffic:
    """What DDP, or FSDP2 as Accelerate applies it (fsdp2_prepare_model), moves for a batch.

    DDP averages the gradients of what is trained, in their own type, in buckets (Li et al. 2020, arXiv:2006.15704).
    FSDP2 gathers the embeddings and each layer in both passes and the rest once, and reduces the gradients in float32
    (Zhao et al. 2023, arXiv:2304.11277; `fsdp.reduce_in_float32`). It cuts weights by rows, each shard as many as the
    first: of the 16 rows of an adapter's A, 512 shards move 512.
    """
    if shards == 1:
        return Traffic(0, 0, 2 * shape.trained_bytes, 0, 0, -(-shape.trained_bytes // BUCKET_BYTES))
    twice, once = list_units(shape)
    sizes = [count_gathered_bytes(unit, compute_dtype, shards) for unit in twice + once]
    trained = [part for part in shape.parts if part.trained_bytes]
    return Traffic(
        gathered=sum(sizes),
        gathered_again=sum(sizes[: len(twice)]),
        reduced=torch.float32.itemsize * sum(part.count_padded_weights(shards) for part in trained),
        units=len(sizes),
        units_again=len(twice),
        buckets=sum(any(part.trained_bytes for part in unit) for unit in twice + once),
    )


def list_units(shape: ModelShape) -> tuple[list[list[Part]], list[list[Part]]]:
    """What FSDP2 gathers as one, in both passes and in the forward pass alone.

    In both: the embeddings, and each layer. Once: the output layer, which tied embeddings are, and the last norm,
    which lies apart from it under an adapter.
    """
    others = [part for part in shape.parts if part.layer is None]
    first = [part for part in others if part.role == "embeddings" and shape.count_weights("output")]
    rest = [part for part in others if part not in first]
    tables = [part for part in rest if part.role in ("embeddings", "output")]
    norms = [part for part in rest if part not in tables]
    tail = [norms, tables] if shape.count_weights("adapter") else [rest]
    return ([first] if first else []) + shape.list_layers(), [unit for unit in tail if unit]


def time_batch(machine: Machine, case: MemoryScenario, share: float) -> tuple[float, float]:
    """Seconds that a GPU computes for a row, forward and backward pass, where this share of layers is recomputed.

    That adds a forward pass: to three where all weights are trained, and to two where the base is frozen.
    """
    shape, config = case.shape, case.config
    peak = find_peak_flops(case.target.device)
    total = count_flops(shape, config, ROW_TOKENS)
    assert peak and total
    forward = 2 * (shape.count_weights() - shape.count_weights("embeddings")) + count_attention(config, ROW_TOKENS) / 3
    backward = total - forward + share * forward
    unpacking = UNPACKED_BYTES * shape.count_weights("linear") / machine.memory_bandwidth if shape.quantization else 0.0
    seconds = ROW_TOKENS / (EFFICIENCY * peak)
    return forward * seconds + unpacking, backward * seconds + (1 + share) * unpacking


def time_waits(
    machine: Machine, traffic: Traffic, sizes: tuple[int, int, int], forward: float, backward: float
) -> tuple[float, float]:
    """Seconds of a step in which a GPU waits for others, and those of all traffic; `sizes`: GPUs, shards, batches.

    The next layer is gathered while one computes, and gradients are reduced while the layers below compute, so that a
    pass takes the longer of the two, before it the first gathering, behind it the last reduction.
    """
    gpus, shards, pieces = sizes
    gather = time_ring(machine, shards, traffic.gathered, traffic.units)
    again = time_ring(machine, shards, traffic.gathered_again, traffic.units_again)
    reduce = time_reduction(machine, traffic, gpus, shards)
    first, last = gather / max(1, traffic.units), reduce / traffic.buckets
    waits = pieces * (first + max(0.0, gather - forward))
    reductions = pieces if shards > 1 else 1  # DDP reduces only what the step's last batch leaves
    waits += reductions * (last + max(0.0, again + reduce - backward))
    small = SMALL_A_STEP * time_ring(machine, gpus, 0, 1, SMALL)
    everything = pieces * (gather + again) + reductions * reduce
    return waits + small, everything + small


def time_reduction(machine: Machine, traffic: Traffic, gpus: int, shards: int) -> float:
    """Seconds to reduce the gradients: to their shards, and over the replicas, each GPU its shard."""
    if shards == 1:
        return time_ring(machine, gpus, traffic.reduced, 2 * traffic.buckets)
    replicas = gpus // shards
    hops = 2 * (replicas - 1) * BULK["network"] * traffic.buckets
    across = 2 * (replicas - 1) / replicas * traffic.reduced / (BANDWIDTH_SHARE * machine.network_bandwidth)
    return time_ring(machine, shards, traffic.reduced, traffic.buckets) + hops + across


def count_network_bytes(machine: Machine, traffic: Traffic, gpus: int, shards: int, pieces: int) -> float:
    """What a host sends in a step: a ring crosses from host to host with all that it carries."""
    gathered = pieces * (traffic.gathered + traffic.gathered_again)
    if shards == 1:
        return (gpus - 1) / gpus * traffic.reduced if count_hosts(machine, gpus) > 1 else 0.0
    if count_hosts(machine, shards) > 1:
        return (shards - 1) / shards * (gathered + pieces * traffic.reduced)
    replicas = gpus // shards
    return 2 * (replicas - 1) / replicas * pieces * traffic.reduced


def count_hosts(machine: Machine, gpus: int) -> int:
    return -(-gpus // machine.gpus)


def time_ring(machine: Machine, gpus: int, size: float, calls: int, latencies: dict[str, float] = BULK) -> float:
    """Seconds of that many collectives over so many bytes in all, as NCCL reckons for itself (src/graph/tuning.cc)."""
    hosts = count_hosts(machine, gpus)
    hops = (gpus - hosts) * latencies[machine.link] + (hosts - 1) * latencies["network"]
    bandwidth = machine.link_bandwidth if hosts == 1 else min(machine.link_bandwidth, machine.network_bandwidth)
    passed = (gpus - 1) / gpus * size / (BANDWIDTH_SHARE * bandwidth)
    return calls * (latencies["start"] + hops) + passed if gpus > 1 else 0.0


if __name__ == "__main__":
    main()
