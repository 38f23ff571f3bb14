# SPDX-License-Identifier: Apache-2.0
"""What a job would suffer from on this host is found, with what to change, and what is missing does not crash it."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trainer.config.environment import read_environment
from llm_trainer.host.machine import (
    inspect_locked_memory,
    inspect_machine,
    inspect_memory,
    inspect_open_files,
    inspect_shared_memory,
    judge_driver,
    judge_gpus,
)
from llm_trainer.host.nvidia_driver import Driver, Gpu

GIB = 2**30


def driver(version="580.95.05", cuda="13.0", gpus=1):
    return Driver(version, cuda, (Gpu("NVIDIA A10G", 24 * GIB),) * gpus)


@pytest.fixture
def limit():
    """Sets a soft limit of this process for one test."""
    kept = {}

    def lower(kind, soft):
        _, hard = kept.setdefault(kind, resource.getrlimit(kind))
        resource.setrlimit(kind, (soft, hard))

    yield lower
    for kind, limits in kept.items():
        resource.setrlimit(kind, limits)


def test_every_part_of_this_machine_is_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "not/there"))
    findings = inspect_machine(read_environment(), requires_efa=True)
    subjects = "GPUs, driver, disk, temp disk, shared memory, memory, open files, locked memory, EFA"
    assert ", ".join(finding.subject for finding in findings) == subjects
    assert all("\n" not in finding.text for finding in findings)


def test_the_launcher_may_ask_without_loading_torch():
    code = "import llm_trainer.host.machine, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gpus_are_counted_and_named():
    assert judge_gpus(driver(gpus=4), num_usable=4).text == "4 x NVIDIA A10G, 24 GiB"
    assert judge_gpus(driver(gpus=4), num_usable=2).text.endswith("CUDA_VISIBLE_DEVICES leaves 2")
    assert judge_gpus(driver(gpus=0), num_usable=0).text == "none: jobs run on the CPU"


def test_a_driver_of_torchs_cuda_release_is_fine():
    assert judge_driver(driver(cuda="13.0"), "13.2", None).verdict == "ok"
    assert judge_driver(driver("610.1.2", "14.1"), "13.0", "580.95.05").verdict == "ok"


def test_an_older_driver_is_fine_with_compat_only():
    old = driver("535.183.01", "12.2")
    assert judge_driver(old, "13.0", "580.95.05").verdict == "ok"
    for compat_version in (None, "535.183.06"):
        finding = judge_driver(old, "13.0", compat_version)
        assert finding.verdict == "error"
        assert finding.text.startswith(
            "535.183.01 supports CUDA 12.2, torch is built with CUDA 13.0, and no cuda-compat"
        )
        assert "use a host" in finding.text


def test_a_driver_whose_libcuda_is_not_mounted_is_an_error():
    finding = judge_driver(driver(cuda=None), "13.0", None)
    assert finding.verdict == "error"
    assert finding.text.endswith("set NVIDIA_DRIVER_CAPABILITIES=compute,utility.")


def test_gpus_that_torch_cannot_use_are_told():
    assert judge_driver(driver(), None, None).verdict == "warning"


def test_small_or_missing_shared_memory_is_told_with_the_docker_flag(tmp_path):
    for folder in (Path("/proc"), tmp_path / "missing"):  # /proc has the size 0
        finding = inspect_shared_memory(folder, num_gpus=2)
        assert finding.verdict == "warning"
        assert "--shm-size=8g" in finding.text
        assert finding.text.endswith("set dataloader_num_workers=0 there.")
        assert inspect_shared_memory(folder, num_gpus=1).verdict == "ok"


def test_few_open_files_are_told(limit):
    limit(resource.RLIMIT_NOFILE, 1024)
    finding = inspect_open_files()
    assert finding.verdict == "warning"
    assert finding.text.startswith("1024 a process")
    limit(resource.RLIMIT_NOFILE, 4096)
    assert inspect_open_files().verdict == "ok"


def test_limited_locked_memory_matters_with_rdma_only(limit):
    limit(resource.RLIMIT_MEMLOCK, 65536)
    assert inspect_locked_memory(rdma_devices=[]).verdict == "ok"
    finding = inspect_locked_memory(rdma_devices=["uverbs0"])
    assert finding.verdict == "warning"
    assert finding.text.endswith("give docker --ulimit memlock=-1.")


def test_memory_is_what_the_container_may_use(tmp_path):
    version_2, version_1 = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    unlimited = inspect_memory((version_2, version_1))
    version_2.write_text("max\n")
    version_1.write_text("9223372036854771712\n")
    assert inspect_memory((version_2, version_1)) == unlimited
    version_2.write_text(f"{2 * GIB}\n")
    finding = inspect_memory((version_2, version_1))
    assert finding.verdict == "warning"
    assert finding.text.startswith("2 GiB by the cgroup limit")
