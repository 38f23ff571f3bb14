# SPDX-License-Identifier: Apache-2.0
"""EFA is recognised by its devices, and several GPU hosts that cannot use theirs stop."""

import dataclasses
import os
from pathlib import Path

import pytest

from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.host import efa
from llm_trainer.host.efa import EfaSoftware, find_efa_software, find_plugin, inspect_efa, judge_efa
from llm_trainer.host.findings import Finding

WORKING = EfaSoftware("libnccl-net.so", "2.4.0amzn5.0")
VERSION = "echo /opt/amazon/efa/bin/fi_info: 2.4.0amzn5.0; echo libfabric: 2.4.0amzn5.0; echo libfabric api: 2.4"
ENDPOINT = "echo provider: efa; echo '    domain: rdmap0-rdm'"


def judge(software=WORKING, verbs_devices=("uverbs0",), has_peers=True, is_required=True) -> Finding:
    """The finding about a host with one EFA device."""
    return judge_efa(["rdmap0"], verbs_devices, software, has_peers, is_required)


def write_fi_info(folder: Path, provider: str) -> dict[str, str]:
    """Put a fi_info into a folder that runs `provider` when it is asked for endpoints; the variables to find it."""
    (folder / "fi_info").write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {VERSION}; else {provider}; fi\n')
    (folder / "fi_info").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture
def gpu_host(tmp_path, monkeypatch) -> Environment:
    """One of two hosts with GPUs and EFA, in an image without anything for it."""
    (tmp_path / "sys/rdmap0/device").mkdir(parents=True)
    (tmp_path / "sys/rdmap0/device/vendor").write_text("0x1d0f\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/uverbs0").touch()
    monkeypatch.setattr(efa.find_efa_devices, "__defaults__", (tmp_path / "sys",))
    monkeypatch.setattr(efa.find_verbs_devices, "__defaults__", (tmp_path / "dev",))
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    return dataclasses.replace(read_environment(), hosts=("algo-1", "algo-2"), num_gpus=8)


def test_several_gpu_hosts_without_the_plugin_stop(gpu_host):
    finding = inspect_efa(gpu_host, is_required=True)
    assert finding.verdict == "error"
    assert finding.text == (
        "rdmap0, but the image has no plugin aws-ofi-nccl, and NCCL would talk over TCP, many times slower: "
        "build it with EFA=1 (docs/hosts.md), or set require_efa=false to train over TCP."
    )
    assert inspect_efa(gpu_host, is_required=False).verdict == "warning"


def test_a_host_alone_and_hosts_without_gpus_miss_nothing(gpu_host):
    for host in (dataclasses.replace(gpu_host, hosts=("algo-1",)), dataclasses.replace(gpu_host, num_gpus=0)):
        assert inspect_efa(host, is_required=True).verdict == "ok"


@pytest.mark.parametrize("network", ["Socket", "AWS Libfabric"])
def test_a_network_that_the_user_names_is_no_silent_loss(gpu_host, monkeypatch, network):
    monkeypatch.setenv("NCCL_NET", network)
    assert inspect_efa(gpu_host, is_required=True) == Finding(
        "EFA", "ok", f"rdmap0; NCCL takes the network {network}, by NCCL_NET"
    )


def test_devices_that_the_container_may_not_open_stop_it_too(gpu_host, tmp_path):
    (tmp_path / "dev/uverbs0").unlink()
    finding = inspect_efa(gpu_host, is_required=True)
    assert finding.verdict == "error"
    assert "give docker --device=/dev/infiniband" in finding.text


def test_a_host_without_efa_is_none_to_judge():
    assert judge_efa([], [], EfaSoftware(None), True, True) == Finding("EFA", "ok", "none: hosts talk over TCP")
    assert judge_efa([], [], WORKING, True, True).text.endswith(
        "; the image has plugin libnccl-net.so, libfabric 2.4.0amzn5.0"
    )


def test_plugin_libfabric_and_provider_are_told(tmp_path):
    (tmp_path / "libnccl-net.so").touch()
    software = find_efa_software(write_fi_info(tmp_path, ENDPOINT), tries_provider=True)
    assert judge(software) == Finding(
        "EFA", "ok", "rdmap0; plugin libnccl-net.so, libfabric 2.4.0amzn5.0, provider efa"
    )


@pytest.mark.parametrize("provider", ["echo 'fi_getinfo: -61 (No data available)' >&2; exit 61", "echo provider: tcp"])
def test_a_provider_that_does_not_work_stops_them(tmp_path, provider):
    (tmp_path / "libnccl-net.so").touch()
    software = find_efa_software(write_fi_info(tmp_path, provider), tries_provider=True)
    assert software.provider_problem in ("fi_getinfo: -61 (No data available)", "provider: tcp")
    assert judge(software).verdict == "error"
    assert f"provider efa does not work ({software.provider_problem})" in judge(software).text


def test_a_fi_info_that_cannot_run_is_no_crash(tmp_path):
    variables = write_fi_info(tmp_path, ENDPOINT)
    (tmp_path / "fi_info").write_text("#!/not/there\n")
    assert find_efa_software(variables, tries_provider=True).libfabric is None


def test_the_plugin_is_the_library_that_nccl_would_load(tmp_path):
    variables = {"LD_LIBRARY_PATH": f"/not/there:{tmp_path}"}
    assert find_plugin(variables) is None
    (tmp_path / "libnccl-net-ofi.so").touch()
    assert find_plugin(variables) == "libnccl-net-ofi.so"
    (tmp_path / "libnccl-net.so").touch()
    assert find_plugin(variables) == "libnccl-net.so"


@pytest.mark.parametrize("name", ["mine", "libnccl-net-mine.so", "{folder}/libnccl-net-mine.so", "none,mine"])
def test_a_plugin_that_the_user_names_is_the_one(tmp_path, name):
    chosen = {"NCCL_NET_PLUGIN": name.format(folder=tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    (tmp_path / "libnccl-net.so").touch()
    assert find_plugin(chosen) is None
    (tmp_path / "libnccl-net-mine.so").touch()
    assert Path(find_plugin(chosen) or "").name == "libnccl-net-mine.so"
