# SPDX-License-Identifier: Apache-2.0
"""Findings about this host: what it offers a job, and what would harm one. Reads kernel files and NVML."""

import os
import resource
import tempfile
from pathlib import Path

import psutil
import pynvml

from llm_trainer.common.units import GIB, show_bytes
from llm_trainer.config.environment import Environment
from llm_trainer.host.efa import find_verbs_devices, inspect_efa
from llm_trainer.host.findings import Finding
from llm_trainer.host.free_space import inspect_disk
from llm_trainer.host.nvidia_driver import (
    COMPAT_DIR,
    Driver,
    find_compat_version,
    find_torch_cuda,
    is_compat_usable,
    parse_major_version,
    read_driver,
)

MIN_SHARED_MEMORY_BYTES = GIB
MIN_MEMORY_BYTES = 4 * GIB
MIN_OPEN_FILES = 4096
SHARED_MEMORY_DIR = Path("/dev/shm")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1


def inspect_machine(environment: Environment, requires_efa: bool) -> list[Finding]:
    """List one finding about each part of this host that a job depends on.

    `requires_efa` is the setting: whether several hosts with EFA must not talk over TCP.
    """
    return [
        *inspect_driver(environment),
        inspect_disk("disk", environment.base_dir),
        inspect_disk("temp disk", Path(tempfile.gettempdir())),
        inspect_shared_memory(SHARED_MEMORY_DIR, environment.num_gpus),
        inspect_memory(CGROUP_LIMITS),
        inspect_open_files(),
        inspect_locked_memory(rdma_devices=find_verbs_devices()),
        inspect_efa(environment, requires_efa),
    ]


def inspect_driver(environment: Environment) -> list[Finding]:
    """List the findings about GPUs and driver."""
    try:
        driver = read_driver()
    except pynvml.NVMLError as error:
        return [
            Finding("GPUs", "ok", "none that can be used: jobs run on the CPU"),
            Finding("driver", "warning", f"NVML says {error}: reload or reinstall the host's NVIDIA driver."),
        ]
    if driver is None:
        return [Finding("GPUs", "ok", "none: jobs run on the CPU"), Finding("driver", "ok", "none")]
    return [
        judge_gpus(driver, environment.num_gpus),
        judge_driver(driver, find_torch_cuda(), find_compat_version(COMPAT_DIR)),
    ]


def judge_gpus(driver: Driver, num_usable: int) -> Finding:
    """Return a finding on the GPUs; a job may use `num_usable` of them."""
    if not driver.gpus:
        return Finding("GPUs", "ok", "none: jobs run on the CPU")
    kinds = dict.fromkeys(f"{gpu.name}, {show_bytes(gpu.memory_bytes)}" for gpu in driver.gpus)
    hidden = "" if num_usable == len(driver.gpus) else f"; CUDA_VISIBLE_DEVICES leaves {num_usable}"
    return Finding("GPUs", "ok", f"{len(driver.gpus)} x {' and '.join(kinds)}{hidden}")


def judge_driver(driver: Driver, torch_cuda: str | None, compat_version: str | None) -> Finding:
    """Return a finding on whether torch's CUDA runs on the driver.

    It does on any driver of the same CUDA major release or a later one, and with a cuda-compat newer than the driver.
    """
    if not driver.gpus:
        return Finding("driver", "ok", f"{driver.version}, without a GPU")
    if torch_cuda is None:
        text = f"{driver.version}, but torch is built without CUDA and leaves the GPUs idle: use the cuda image."
        return Finding("driver", "warning", text)
    if driver.cuda is None:
        text = (
            f"{driver.version}, but its libcuda.so.1 is not in the container and torch needs it: "
            "set NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        )
        return Finding("driver", "error", text)
    versions = f"{driver.version} supports CUDA {driver.cuda}, torch is built with CUDA {torch_cuda}"
    if parse_major_version(driver.cuda) >= parse_major_version(torch_cuda):
        return Finding("driver", "ok", versions)
    if is_compat_usable(driver.version, compat_version):
        return Finding("driver", "ok", f"{versions}; cuda-compat {compat_version} bridges them")
    text = (
        f"{versions}, and no cuda-compat newer than the driver is in {COMPAT_DIR}: "
        f"use a host (on SageMaker, a newer instance type) whose driver supports CUDA "
        f"{parse_major_version(torch_cuda)}.0, or an image that has its cuda-compat."
    )
    return Finding("driver", "error", text)


def inspect_shared_memory(folder: Path, num_gpus: int) -> Finding:
    """Return a finding on the size of the shared memory, which NCCL and data loader processes use."""
    try:
        statistics = os.statvfs(folder)
        size_bytes = statistics.f_blocks * statistics.f_frsize
    except FileNotFoundError:
        size_bytes = 0
    if size_bytes >= MIN_SHARED_MEMORY_BYTES:
        return Finding("shared memory", "ok", f"{show_bytes(size_bytes)} in {folder}")
    if num_gpus < 2:  # nothing goes through it then, unless the user asks for data loader processes
        return Finding("shared memory", "ok", f"{show_bytes(size_bytes)} in {folder}, enough for a single process")
    text = (
        f"{show_bytes(size_bytes)} in {folder}, and data loader processes and NCCL need "
        f"{show_bytes(MIN_SHARED_MEMORY_BYTES)}: give docker --shm-size=8g; SageMaker has no setting for it, so set "
        "dataloader_num_workers=0 there."
    )
    return Finding("shared memory", "warning", text)


def inspect_memory(cgroup_limits: tuple[Path, ...]) -> Finding:
    """Return a finding on the machine's memory, or on the container's limit where that is lower."""
    total_bytes = psutil.virtual_memory().total
    limit_bytes = min(total_bytes, find_limit(cgroup_limits))
    text = f"{show_bytes(limit_bytes)}{' by the cgroup limit' if limit_bytes < total_bytes else ''}"
    if limit_bytes >= MIN_MEMORY_BYTES:
        return Finding("memory", "ok", text)
    need = f"a job needs {show_bytes(MIN_MEMORY_BYTES)} or more"
    return Finding("memory", "warning", f"{text}, and {need}: use a larger machine, or raise docker's --memory.")


def find_available_memory() -> int:
    """Return the bytes of memory that processes can still take, within the container's limit."""
    return int(min(psutil.virtual_memory().available, find_limit(CGROUP_LIMITS)))


def find_limit(cgroup_limits: tuple[Path, ...]) -> float:
    """Return the bytes of memory that the container may use; infinity where it has no limit."""
    return min(map(read_limit, filter(Path.is_file, cgroup_limits)), default=float("inf"))


def read_limit(file: Path) -> float:
    """Return the limit in a cgroup file, in bytes; infinity for none."""
    text = file.read_text(encoding="ascii").strip()
    return float("inf") if text == "max" else int(text)


def inspect_open_files() -> Finding:
    """Return a finding on how many files a process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= MIN_OPEN_FILES:
        return Finding("open files", "ok", "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} a process")
    text = (
        f"{limit} a process, and data loaders and sockets need {MIN_OPEN_FILES}: "
        "run `ulimit -n 65536` first, or give docker --ulimit nofile=65536:65536."
    )
    return Finding("open files", "warning", text)


def inspect_locked_memory(rdma_devices: list[str]) -> Finding:
    """Return a finding on the limit of locked memory, which RDMA devices need without limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "unlimited")
    if not rdma_devices:
        return Finding("locked memory", "ok", f"{show_bytes(limit)}, and no RDMA device needs more")
    text = (
        f"{show_bytes(limit)}, and the RDMA devices {', '.join(rdma_devices)} need it without limit: "
        "give docker --ulimit memlock=-1."
    )
    return Finding("locked memory", "warning", text)
