# SPDX-License-Identifier: Apache-2.0
"""Hosts find each other by the devices and interfaces that there are."""

import dataclasses
import json
from pathlib import Path

import pytest

from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.host.network import build_network_variables


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Environment:
    """A job of two hosts, both of them this machine, with an interface that is not here."""
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    (tmp_path / "input/config").mkdir(parents=True)
    resources = {"current_host": "127.0.0.1", "hosts": ["127.0.0.1", "localhost"], "network_interface_name": "ethwe"}
    (tmp_path / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    return read_environment()


@pytest.fixture
def efa_dirs(tmp_path) -> tuple[Path, Path]:
    """What a host with one EFA and one other RDMA device shows in /sys and /dev."""
    for device, vendor in (("rdmap0", "0x1d0f"), ("mlx5_0", "0x15b3")):
        (tmp_path / "sys" / device / "device").mkdir(parents=True)
        (tmp_path / "sys" / device / "device/vendor").write_text(f"{vendor}\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/uverbs0").touch()
    return tmp_path / "sys", tmp_path / "dev"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Puts a library of that name where the loader looks."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return lambda name: (tmp_path / name).touch()


def test_one_host_needs_nothing(environment):
    assert build_network_variables(dataclasses.replace(environment, hosts=("127.0.0.1",), network_interface="lo")) == {}


def test_without_efa_nccl_keeps_to_sockets(environment, tmp_path):
    variables = build_network_variables(environment, tmp_path / "no-sys", tmp_path / "no-dev")
    assert variables["NCCL_NET"] == "Socket"
    assert variables["NCCL_HOSTID"] == "127.0.0.1"


def test_with_efa_and_its_plugin_nccl_chooses_itself(environment, efa_dirs, plugin):
    plugin("libnccl-net.so")
    assert build_network_variables(environment, *efa_dirs) == {
        "NCCL_HOSTID": "127.0.0.1",
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def test_a_plugin_that_nccl_would_not_look_for_is_named_to_it(environment, efa_dirs, plugin):
    plugin("libnccl-net-ofi.so")
    variables = build_network_variables(environment, *efa_dirs)
    assert variables["NCCL_NET_PLUGIN"] == "ofi"
    assert "NCCL_NET" not in variables


def test_efa_without_the_plugin_is_none(environment, efa_dirs):
    assert build_network_variables(environment, *efa_dirs)["NCCL_NET"] == "Socket"


def test_efa_that_the_container_may_not_open_is_none(environment, efa_dirs, plugin):
    plugin("libnccl-net.so")
    sys_dir, dev_dir = efa_dirs
    (dev_dir / "uverbs0").unlink()
    assert build_network_variables(environment, sys_dir, dev_dir)["NCCL_NET"] == "Socket"


def test_another_makers_device_is_no_efa(environment, efa_dirs, plugin):
    plugin("libnccl-net.so")
    sys_dir, dev_dir = efa_dirs
    (sys_dir / "rdmap0/device/vendor").write_text("0x15b3\n")
    assert build_network_variables(environment, sys_dir, dev_dir)["NCCL_NET"] == "Socket"


def test_the_interface_that_sagemaker_names_is_used_if_it_exists(environment):
    named = dataclasses.replace(environment, hosts=("algo-1.invalid", "algo-2.invalid"), network_interface="lo")
    assert build_network_variables(named)["NCCL_SOCKET_IFNAME"] == "lo"


def test_else_the_one_that_leads_to_another_host(environment):
    assert build_network_variables(environment)["GLOO_SOCKET_IFNAME"] == "lo"
    unnamed = dataclasses.replace(environment, network_interface=None)
    assert build_network_variables(unnamed)["NCCL_SOCKET_IFNAME"] == "lo"


def test_else_none_is_set(environment):
    alone = dataclasses.replace(environment, hosts=("127.0.0.1", "algo-2.invalid"))
    assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & set(build_network_variables(alone))
