# SPDX-License-Identifier: Apache-2.0
"""What a step takes on 1 to 512 GPUs, on paper: time, memory, network and checkpoints; the tables of bench/scaling.md.

    .venv/bin/python bench/scaling.py

The model is the one of `llm-trainer plan` (planning/step_time.py, planning/traffic.py). scaling.md says what is
assumed and what was measured.
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
from llm_trainer.model.memory.scenario import (
    MemoryScenario,
    MemorySettings,
    Target,
    list_parallelism_plans,
)
from llm_trainer.planning.fitting import count_free_bytes
from llm_trainer.planning.instances import InstanceType, read_instances
from llm_trainer.planning.step_time import StepTime, time_step
from llm_trainer.planning.traffic import Spread, count_hosts, count_network_bytes, count_traffic

ROW_TOKENS = 4096  # packed, one row a GPU at a time
ROWS_A_STEP = 64  # kept by gradient_accumulation_steps up to as many GPUs
INSTANCES = (("p5", "48xlarge"), ("p4d", "24xlarge"), ("g6e", "48xlarge"), ("g5", "48xlarge"))
DISK_BYTES_A_SECOND = 2e9  # of a host, at which a checkpoint is written and read again for its digests

TYPES = read_instances().types
P5, P4D, G6E, G5 = (TYPES[f"ml.{name}.{size}"] for name, size in INSTANCES)

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
    host: InstanceType
    within_host: bool = False  # sharded over the GPUs of a host, and replicated over hosts

    @property
    def title(self) -> str:
        spread = self.distribution.upper() + (" within a host" if self.within_host else "")
        return f"{self.model}, {self.method}, {spread}, {self.host.name.removeprefix('ml.')}"


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
class Row:
    """A line of a table."""

    gpus: int
    pieces: int  # gradient_accumulation_steps
    recomputed_layers: int
    num_layers: int
    memory_bytes: int  # of a GPU
    fits: bool
    step: StepTime
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
        return self.step.seconds

    @property
    def efficiencies(self) -> tuple[float, float]:
        """The share of the time in which a GPU computes: as it is, and if no traffic went on meanwhile."""
        computing, waiting = self.step.compute_seconds, (self.step.waiting_seconds, self.step.traffic_seconds)
        return tuple(computing / (computing + seconds) for seconds in waiting)

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
    host, base = scenario.host, build_case(scenario.model, scenario.method)
    device = Device(torch.device("cuda"), host.gpu.name, (8, 0))
    on_host = base.replace_settings(distribution=scenario.distribution).replace_target(
        device=device, free_bytes=count_free_bytes(host.gpu)
    )
    for gpus in SIZES:
        if gpus >= host.num_gpus or scenario.distribution == "ddp":
            shards = host.num_gpus if scenario.within_host else gpus
            pieces = max(1, ROWS_A_STEP // gpus)
            yield compute_row(
                scenario,
                on_host.replace_settings(gradient_accumulation_steps=pieces).replace_target(world_size=shards),
                gpus,
            )


@functools.cache
def build_case(model: str, method: str) -> MemoryScenario:
    """A job of one row at a time, on no machine yet. Its shape, which is dear, serves all."""
    settings = Settings(packing=True, max_length=ROW_TOKENS, per_device_train_batch_size=1, **METHODS[method])
    sections = MemorySettings(settings.model, settings.adapter, settings.data, settings.training, settings.parallelism)
    target = Target(Device(torch.device("cuda"), P5.gpu.name, (8, 0)), world_size=1, free_bytes=0)
    return MemoryScenario(MODELS[model], sections, ROW_TOKENS, target, "flash_attention_2", frozenset(KERNELS))


def compute_row(scenario: Scenario, case: MemoryScenario, gpus: int) -> Row:
    """A job whose model, if it is sharded, is so over the case's GPUs, and replicated over the others."""
    host, shape, pieces = scenario.host, case.shape, case.settings.training.gradient_accumulation_steps
    needs = [
        keep_layers(case, way)
        for way in list_parallelism_plans(case.settings, case.target)
        if not way.offload_activations
    ]
    way, need = next(((way, need) for way, need in needs if case.can_hold(need)), needs[-1])
    spread = Spread(gpus, case.target.world_size if way.sharded else 1, pieces)
    step = time_step(host, case, way, gpus, ROW_TOKENS)
    assert step is not None
    return Row(
        gpus=gpus,
        pieces=pieces,
        recomputed_layers=shape.num_layers - way.kept_layers if way.recompute_activations else 0,
        num_layers=shape.num_layers,
        memory_bytes=need.total_bytes,
        fits=case.can_hold(need),
        step=step,
        network_bytes=count_network_bytes(host, count_traffic(shape, case.dtypes[1], spread.shards), spread),
        checkpoint_bytes=shape.trained_bytes + count_optimizer_states(shape, case.settings.training.optim),
        writing_hosts=count_hosts(host, spread.shards),
    )


if __name__ == "__main__":
    main()
