# SPDX-License-Identifier: Apache-2.0
"""The GPUs of SageMaker's instance types, as their vendor rates them: gpus.json, with the source of each number.

`memory_gib` is the total that CUDA reports: the least in those messages of torch.OutOfMemoryError that were found.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm_trainer.common.units import GIB

FACTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Gpu:
    """The ratings of a GPU. Operations a second are dense, on tensor cores with float32 sums for 16 bits and 8.

    Bandwidths are in bytes a second. Links count one way. None: the GPU has no such units or no such link.
    """

    name: str  # such as A100 40GB
    size_gb: int  # of its memory, as it is sold
    memory_bytes: int  # the total that CUDA reports, which is mostly less
    capability: tuple[int, int]  # CUDA's compute capability
    bf16_flops: float | None
    fp16_flops: float
    fp8_flops: float | None
    fp32_flops: float  # without tensor cores
    memory_bandwidth: float
    nvlink_bandwidth: float | None
    pcie_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Operations a second in 16 bits: in bfloat16 where the GPU has it, else in float16."""
        return self.bf16_flops or self.fp16_flops


@functools.cache
def read_gpus() -> Mapping[str, Gpu]:
    """Return all GPUs by name."""
    return MappingProxyType({name: build_gpu(name, facts) for name, facts in read_facts().items()})


def find_gpu(cuda_name: str) -> Gpu | None:
    """Return the GPU that CUDA reports by this name, or None where its rating is not known."""
    for name, facts in read_facts().items():
        if re.fullmatch(facts["cuda_name"], cuda_name):
            return read_gpus()[name]
    return None


@functools.cache
def read_facts() -> dict[str, dict[str, Any]]:
    """Return the content of gpus.json: facts by the name of the GPU, as they are written there."""
    return json.loads(FACTS.read_text(encoding="utf-8"))


def build_gpu(name: str, facts: Mapping[str, Any]) -> Gpu:
    """Return a GPU by its facts, which are in GiB, TFLOPS and GB a second."""
    teraflops = {f"{kind}_flops": facts[f"{kind}_tflops"] for kind in ("bf16", "fp16", "fp8", "fp32")}
    bandwidths = {f"{kind}_bandwidth": facts[f"{kind}_gb_a_second"] for kind in ("memory", "nvlink", "pcie")}
    return Gpu(
        name,
        facts["size_gb"],
        int(facts["memory_gib"] * GIB),
        tuple(facts["capability"]),
        **{key: value and value * 1e12 for key, value in teraflops.items()},
        **{key: value and value * 1e9 for key, value in bandwidths.items()},
    )
