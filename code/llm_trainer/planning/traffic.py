# SPDX-License-Identifier: Apache-2.0
"""The bytes that the GPUs of a job exchange in a step, and the seconds that a ring of them takes.

The traffic is what torch's DDP and FSDP2 send, as counted on real ranks (bench/ranks.py). The time of a collective is
NCCL's own model of a ring.
"""

import functools
from dataclasses import dataclass

import torch

from llm_trainer.model.memory.passes import count_gathered_bytes
from llm_trainer.model.memory.shape import ModelShape, Part
from llm_trainer.planning.instances import InstanceType

BANDWIDTH_SHARE = 0.8  # of what a link or a network is rated at
BUCKET_BYTES = 25 * 2**20  # DDP's: the last one is reduced when nothing is left to compute
# NCCL's model of a ring (src/graph/tuning.cc): the start, a hop over NVLink, PCIe, the network; in seconds.
BULK = {"start": 8.4e-6, "nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 9.6e-6}  # protocol Simple
SMALL = {"start": 3.6e-6, "nvlink": 0.5e-6, "pcie": 1.0e-6, "network": 2.7e-6}  # protocol LL
SMALL_A_STEP = 2  # collectives of a few numbers: the tokens of a step, and the gradients' norm


@dataclass(frozen=True)
class Spread:
    """GPUs of a job: how many there are, how many share one copy of the model, and what each of them does in a step."""

    gpus: int
    shards: int
    pieces: int  # batches that are added up
    forwards: float = 1  # forward passes over a batch: a reference adds one, for example

    @property
    def replicas(self) -> int:
        """The number of copies of the model."""
        return self.gpus // self.shards


@dataclass(frozen=True)
class Traffic:
    """Bytes that a batch has summed or gathered. A ring sends (ranks - 1) / ranks of them from every rank."""

    gathered: int  # weights, in the forward pass
    gathered_again: int  # and in the backward pass
    reduced: int  # gradients; an all-reduce is two passes, a reduce-scatter one
    units: int  # modules that are gathered as one, in the forward pass
    units_again: int  # and in the backward pass
    buckets: int  # of gradients that are reduced as one


@functools.lru_cache(maxsize=1024)
def count_traffic(shape: ModelShape, compute_dtype: torch.dtype, shards: int) -> Traffic:
    """Return what DDP, or FSDP2 as Accelerate applies it (fsdp2_prepare_model), moves for a batch.

    DDP averages the gradients of what is trained, in their own type, in buckets (Li et al. 2020, arXiv:2006.15704).
    FSDP2 gathers the embeddings and each layer in both passes and the rest once. It reduces the gradients in float32
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
    """Return what FSDP2 gathers as one, in both passes and in the forward pass alone.

    In both: the embeddings, and each layer. Once: the output layer, which tied embeddings are, and the last norm,
    which lies apart from it under an adapter.
    """
    others = [part for part in shape.parts if part.layer is None and part.role != "tower"]
    first = [part for part in others if part.role == "embeddings" and shape.count_weights("output")]
    rest = [part for part in others if part not in first]
    tables = [part for part in rest if part.role in ("embeddings", "output")]
    norms = [part for part in rest if part not in tables]
    tail = [norms, tables] if shape.count_weights("adapter") else [rest]
    return ([first] if first else []) + shape.list_layers(), [unit for unit in tail if unit]


def time_waits(
    host: InstanceType, traffic: Traffic, spread: Spread, forward: float, backward: float
) -> tuple[float, float]:
    """Return the seconds of a step in which a GPU waits for others, and the seconds of all traffic.

    `forward` and `backward` are seconds of computing of one pass. The next layer is gathered while one computes, and
    gradients are reduced while the layers below compute. A pass therefore takes the longer of the two, with the first
    gathering before it and the last reduction behind it.
    """
    gather = time_ring(host, spread.shards, traffic.gathered, traffic.units)
    again = time_ring(host, spread.shards, traffic.gathered_again, traffic.units_again)
    reduce = time_reduction(host, traffic, spread)
    first, last = gather / max(1, traffic.units), reduce / max(1, traffic.buckets)
    waits = spread.pieces * spread.forwards * (first + max(0.0, gather - forward))
    reductions = spread.pieces if spread.shards > 1 else 1  # DDP reduces only what the step's last batch leaves
    waits += reductions * (last + max(0.0, again + reduce - backward))
    small = SMALL_A_STEP * time_ring(host, spread.gpus, 0, 1, SMALL)
    everything = spread.pieces * (spread.forwards * gather + again) + reductions * reduce
    return waits + small, everything + small


def time_reduction(host: InstanceType, traffic: Traffic, spread: Spread) -> float:
    """Return the seconds to reduce the gradients: to their shards, and over the replicas, each GPU its shard."""
    if spread.shards == 1:
        return time_ring(host, spread.gpus, traffic.reduced, 2 * traffic.buckets)
    replicas = spread.replicas
    hops = 2 * (replicas - 1) * BULK["network"] * traffic.buckets
    across = 2 * (replicas - 1) / replicas * traffic.reduced / (BANDWIDTH_SHARE * host.network_bandwidth)
    return time_ring(host, spread.shards, traffic.reduced, traffic.buckets) + hops + across


def count_network_bytes(host: InstanceType, traffic: Traffic, spread: Spread) -> float:
    """Return what a host sends in a step: a ring crosses from host to host with all that it carries."""
    gathered = spread.pieces * (spread.forwards * traffic.gathered + traffic.gathered_again)
    if spread.shards == 1:
        crosses = count_hosts(host, spread.gpus) > 1
        return (spread.gpus - 1) / spread.gpus * traffic.reduced if crosses else 0.0
    if count_hosts(host, spread.shards) > 1:
        return (spread.shards - 1) / spread.shards * (gathered + spread.pieces * traffic.reduced)
    return 2 * (spread.replicas - 1) / spread.replicas * spread.pieces * traffic.reduced


def count_hosts(host: InstanceType, gpus: int) -> int:
    """Return the number of such hosts that have so many GPUs."""
    return -(-gpus // host.num_gpus)


def time_ring(host: InstanceType, gpus: int, size: float, calls: int, latencies: dict[str, float] = BULK) -> float:
    """Return the seconds of that many collectives over so many bytes in all, as NCCL reckons (src/graph/tuning.cc)."""
    hosts = count_hosts(host, gpus)
    link = "nvlink" if host.nvlink_bandwidth else "pcie"
    hops = (gpus - hosts) * latencies[link] + (hosts - 1) * latencies["network"]
    within = host.nvlink_bandwidth or host.gpu.pcie_bandwidth
    bandwidth = within if hosts == 1 else min(within, host.network_bandwidth)
    passed = (gpus - 1) / gpus * size / (BANDWIDTH_SHARE * bandwidth)
    return calls * (latencies["start"] + hops) + passed if gpus > 1 else 0.0
