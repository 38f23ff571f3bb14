# SPDX-License-Identifier: Apache-2.0
"""A job that has trained beside its plan: memory, the time of a step, hours and cost, for manifest, log and report."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.units import show_bytes, show_duration
from llm_trainer.model.device import Device
from llm_trainer.model.memory.gpus import Gpu, find_gpu
from llm_trainer.model.memory.shape import UnknownShapeError
from llm_trainer.planning.candidates import Candidate, Outline, plan_time
from llm_trainer.planning.fitting import Fit
from llm_trainer.planning.instances import InstanceType, read_instances
from llm_trainer.planning.prices import Prices, find_price_file, find_warnings, read_prices
from llm_trainer.planning.run_time import PULL_SECONDS

# A core's operations in float32 and all cores' bytes a second: rough, as a CPU's speed is to be learnt.
CORE_FLOPS, CPU_BYTES = 100e9, 40e9
HERE, CPU = "this machine", "CPU"


@dataclass(frozen=True)
class Figures:
    """The figures of a job up to its export, as planned or as they were."""

    memory_bytes: int  # of tensors at the peak of the training, in a process
    step_seconds: float | None  # the mean; None where there was only one
    start_seconds: float  # from the start of the container to the first step, which takes longer than others
    hours: float


def find_host(instance_type: str | None, device: Device, num_local: int) -> InstanceType | None:
    """Return the host that this process runs on, by the facts of its type or of its GPU. None: neither is known."""
    known = read_instances().types.get(instance_type or "")
    if known and device.is_gpu:
        return replace(known, num_gpus=num_local)
    gpu = find_gpu(device.name) if device.is_gpu else describe_cpu(num_local)
    if gpu is None:
        return None
    network = 1e9  # bytes a second: an assumption, as nothing is known of the machine
    return InstanceType(instance_type or HERE, gpu, num_local, os.cpu_count() or 1, 0, 0, network, 0)


def describe_cpu(num_processes: int) -> Gpu:
    """Return the share of this host's CPU that each of its processes has, as a device that can be planned."""
    cores = (os.cpu_count() or 1) / num_processes
    peak = CORE_FLOPS * cores
    return Gpu(CPU, 0, 0, (0, 0), None, peak, None, peak, CPU_BYTES / num_processes, None, CPU_BYTES)


def read_prices_beside(config_dir: Path | None) -> Prices | None:
    """Return the prices in the channel `config`, after warning of those of other regions and of old ones.

    Files that are wrong are warned of, too: they must not cost a result.
    """
    try:
        file = find_price_file(config_dir)
        prices = read_prices(file) if file else None
    except UserError as error:
        log.warning(str(error))
        return None
    for text in find_warnings(prices, os.environ.get("AWS_REGION")) if prices else ():
        log.warning(text)
    return prices


def compare_with_plan(outline: Outline, host: InstanceType, count: int, fit: Fit, actual: Figures) -> dict[str, Any]:
    """Return what was planned for the job beside what it took, as values of JSON; empty where it cannot be planned."""
    try:
        candidate = plan_time(outline, Candidate(host, count, fit))
    except UnknownShapeError:
        return {}
    step, run = candidate.step, candidate.run
    if step is None or run is None:
        return {}
    price = outline.prices.on_demand.get(host.name) if outline.prices else None
    planned = Figures(
        memory_bytes=fit.need.peak_bytes,
        step_seconds=step.seconds,
        start_seconds=run.start - PULL_SECONDS,
        hours=(run.seconds - run.export - PULL_SECONDS) / 3600,
    )
    return {
        "instance_type": host.name,
        "count": count,
        "gpu": host.gpu.name,
        "planned": {"steps": candidate.steps, **asdict(planned), "dollars": price and price * count * planned.hours},
        "actual": {**asdict(actual), "dollars": price and price * count * actual.hours},
    }


def describe_comparison(compared: dict[str, Any]) -> str:
    """Return a line for the log, such as `Planned and actual: memory 2 GiB and 2.1 GiB; ...`."""
    planned, actual = compared["planned"], compared["actual"]
    parts = [f"memory {show_bytes(planned['memory_bytes'])} and {show_bytes(actual['memory_bytes'])}"]
    if actual["step_seconds"]:
        parts.append(f"a step {planned['step_seconds']:.3g} s and {actual['step_seconds']:.3g} s")
    times = (show_duration(max(0.0, 3600 * each["hours"])) for each in (planned, actual))
    parts.append(f"until the export {' and '.join(times)}")
    return f"Planned and actual: {'; '.join(parts)}"
