# SPDX-License-Identifier: Apache-2.0
"""EFA on this host: its devices, and the software by which NCCL uses them. Recognised by what is there.

NCCL loads its plugin by name, and says nothing where it finds none: then hosts talk over TCP, many times slower.
"""

import ctypes.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.common.processes import bind_command
from llm_trainer.config.environment import Environment
from llm_trainer.host.findings import Finding

INFINIBAND_SYS_DIR = Path("/sys/class/infiniband")
INFINIBAND_DEV_DIR = Path("/dev/infiniband")
AMAZON_VENDOR = "0x1d0f"
FI_INFO = "/opt/amazon/efa/bin/fi_info"  # where AWS's installer puts it, beside libfabric
FI_INFO_SECONDS = 30
# By its first name NCCL finds aws-ofi-nccl itself. The packages for NVIDIA's images have the second name alone.
PLUGIN_LIBRARIES = ("libnccl-net.so", "libnccl-net-ofi.so")
SET_REQUIRE_EFA = "set require_efa=false to train over TCP"


@dataclass(frozen=True)
class EfaSoftware:
    """The software of this image that NCCL needs for EFA."""

    plugin: str | None  # file name of aws-ofi-nccl's library
    libfabric: str | None = None  # version
    provider_problem: str | None = None  # why libfabric's provider `efa` does not work

    def describe(self) -> str:
        """Return its parts as the end of a sentence."""
        libfabric = f"libfabric {self.libfabric}" if self.libfabric else "libfabric of an unknown version"
        return f"plugin {self.plugin}, {libfabric}" if self.plugin else "no plugin for NCCL"


def inspect_efa(environment: Environment, is_required: bool) -> Finding:
    """Return a finding on whether NCCL can use this host's EFA. It is an error in a job that `is_required` stops.

    Where the user names NCCL's network, NCCL takes it or fails: nothing can go wrong in silence.
    """
    devices, verbs_devices = find_efa_devices(), find_verbs_devices()
    if chosen := os.environ.get("NCCL_NET"):
        return Finding("EFA", "ok", f"{', '.join(devices) or 'none'}; NCCL takes the network {chosen}, by NCCL_NET")
    software = find_efa_software(os.environ, tries_provider=bool(devices and verbs_devices))
    has_peers = len(environment.hosts) > 1 and environment.num_gpus > 0  # gloo, on CPUs, knows no EFA
    return judge_efa(devices, verbs_devices, software, has_peers, is_required)


def judge_efa(
    devices: Sequence[str], verbs_devices: Sequence[str], software: EfaSoftware, has_peers: bool, is_required: bool
) -> Finding:
    """Return a finding on EFA. `has_peers` tells whether NCCL talks to other hosts: else nothing is missed."""
    if not devices:
        has_software = f"; the image has {software.describe()}" if software.plugin else ""
        return Finding("EFA", "ok", f"none: hosts talk over TCP{has_software}")
    if not verbs_devices:
        missing, fix = "the container has no /dev/infiniband/uverbs*", "give docker --device=/dev/infiniband"
    elif software.plugin is None:
        missing, fix = "the image has no plugin aws-ofi-nccl", "build it with EFA=1 (docs/hosts.md)"
    elif software.provider_problem:
        missing = f"libfabric's provider efa does not work ({software.provider_problem})"
        fix = "use an image whose libfabric fits the host's EFA driver (docs/hosts.md), without FI_PROVIDER"
    else:
        return Finding("EFA", "ok", f"{', '.join(devices)}; {software.describe()}, provider efa")
    text = f"{', '.join(devices)}, but {missing}, and NCCL would talk over TCP, many times slower: {fix}"
    if not has_peers:
        return Finding("EFA", "ok", f"{text}.")
    return Finding("EFA", "error", f"{text}, or {SET_REQUIRE_EFA}.") if is_required else Finding("EFA", "warning", text)


def find_efa_devices(sys_dir: Path = INFINIBAND_SYS_DIR) -> list[str]:
    """List the host's EFA devices by name. The kernel shows them even where the container was not given them."""
    vendors = sorted(sys_dir.glob("*/device/vendor"))
    return [file.parent.parent.name for file in vendors if file.read_text(encoding="ascii").strip() == AMAZON_VENDOR]


def find_verbs_devices(dev_dir: Path = INFINIBAND_DEV_DIR) -> list[str]:
    """List the RDMA devices, of any maker, that this container may open."""
    return sorted(file.name for file in dev_dir.glob("uverbs*"))


def find_efa_software(variables: Mapping[str, str], tries_provider: bool) -> EfaSoftware:
    """Return what the image has for EFA. The provider can be tried only where there are devices."""
    plugin = find_plugin(variables)
    fi_info = shutil.which("fi_info", path=variables.get("PATH")) or shutil.which(FI_INFO)
    if fi_info is None:
        return EfaSoftware(plugin)
    _, told = run_fi_info([fi_info, "--version"])
    version = re.search(r"^libfabric: (\S+)$", told, re.MULTILINE)
    problem = find_provider_problem(fi_info) if tries_provider else None
    return EfaSoftware(plugin, version[1] if version else None, problem)


def find_plugin(variables: Mapping[str, str]) -> str | None:
    """Return the library of NCCL's plugin, as the loader would find it. A user may name another one, or a file."""
    given = [name for name in variables.get("NCCL_NET_PLUGIN", "").split(",") if name]
    libraries = [name if name.endswith(".so") else f"libnccl-net-{name}.so" for name in given] or PLUGIN_LIBRARIES
    folders = ["/", *filter(None, variables.get("LD_LIBRARY_PATH", "").split(":"))]  # a file stays itself below "/"
    for library in libraries:
        is_known = ctypes.util.find_library(library.removeprefix("lib").removesuffix(".so"))
        if is_known or any(Path(folder, library).exists() for folder in folders):
            return library
    return None


def find_provider_problem(fi_info: str) -> str | None:
    """Return why libfabric offers no endpoint of EFA; None where it does."""
    exit_code, told = run_fi_info([fi_info, "-p", "efa", "-t", "FI_EP_RDM"])
    if exit_code == 0 and "provider: efa" in told:
        return None
    return told.strip().splitlines()[-1] if told.strip() else f"fi_info ended with exit code {exit_code}"


def run_fi_info(command: Sequence[str]) -> tuple[int, str]:
    """Return the exit code and the output of fi_info. One that cannot run, or does not end, fails."""
    try:
        result = subprocess.run(
            bind_command(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=FI_INFO_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return result.returncode, result.stdout
