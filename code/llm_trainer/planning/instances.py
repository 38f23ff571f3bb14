# SPDX-License-Identifier: Apache-2.0
"""The instance types of SageMaker training, from instances.json, which `make instance-facts` writes.

The file is a dated copy of EC2's list of instance types and of SageMaker's. Nothing is asked of AWS.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm_trainer.model.memory.gpus import Gpu, read_gpus

FACTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class InstanceType:
    """An instance type with GPUs that this image trains on."""

    name: str  # such as ml.p4d.24xlarge
    gpu: Gpu
    num_gpus: int
    num_vcpus: int
    memory_bytes: int  # of the host
    local_disk_bytes: int  # of its own NVMe disks: SageMaker puts /tmp and /opt/ml on them
    network_bandwidth: float  # bytes a second that the host may send without a limit of time
    num_efa: int  # network interfaces with EFA

    @property
    def family(self) -> str:
        """The name without its size, such as ml.p4d."""
        return self.name.rpartition(".")[0]

    @property
    def nvlink_bandwidth(self) -> float | None:
        """Bytes a second that a GPU sends to the others over NVLink; None where there is no such link."""
        return self.gpu.nvlink_bandwidth if self.num_gpus > 1 else None


@dataclass(frozen=True)
class InstanceFacts:
    """The content of instances.json."""

    made_on: str  # date, such as 2026-11-26
    sources: Mapping[str, str]  # version of each package that the facts come from
    types: Mapping[str, InstanceType]  # by name
    left_out: Mapping[str, str]  # why each other type with accelerators is not among them
    without_gpu: tuple[str, ...]

    @property
    def origin(self) -> str:
        """The date and the sources, to be shown beside what is planned."""
        versions = " and ".join(f"{package} {version}" for package, version in self.sources.items())
        return f"instance facts of {self.made_on}, from {versions}"


@functools.cache
def read_instances() -> InstanceFacts:
    """Return the facts of all instance types of SageMaker training."""
    content = json.loads(FACTS.read_text(encoding="utf-8"))
    return InstanceFacts(
        content["made_on"],
        content["sources"],
        MappingProxyType({name: build_type(name, facts) for name, facts in content["types"].items()}),
        content["left_out"],
        tuple(content["without_gpu"]),
    )


def build_type(name: str, facts: Mapping[str, Any]) -> InstanceType:
    """Return an instance type by its facts, which are in MiB, GB and Gbit a second."""
    return InstanceType(
        name,
        read_gpus()[facts["gpu"]],
        facts["num_gpus"],
        facts["num_vcpus"],
        facts["memory_mib"] * 2**20,
        facts["local_disk_gb"] * 10**9,
        facts["network_gbits_a_second"] * 1e9 / 8,
        facts["num_efa"],
    )
