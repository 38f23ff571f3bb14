# SPDX-License-Identifier: Apache-2.0
"""The network between the hosts of a job: EFA devices and interfaces, found by what is there, not by instance type.

Only variables that NCCL and Gloo cannot find out are set. RDMAV_FORK_SAFE, FI_PROVIDER and FI_EFA_USE_DEVICE_RDMA are
left alone: aws-ofi-nccl sets what it needs, and its documentation says not to use them.
"""

import os
import socket
from pathlib import Path

import psutil

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.config.environment import Environment
from llm_trainer.host.efa import (
    INFINIBAND_DEV_DIR,
    INFINIBAND_SYS_DIR,
    find_efa_devices,
    find_plugin,
    find_verbs_devices,
)

LOOPBACKS = ("lo", "lo0")  # as Linux and macOS name it
DISCARD_PORT = 9  # any port would do: nothing is sent


def build_network_variables(
    environment: Environment, sys_dir: Path = INFINIBAND_SYS_DIR, dev_dir: Path = INFINIBAND_DEV_DIR
) -> dict[str, str]:
    """Return the workers' variables in a job of several hosts; {} on one host, where NCCL and Gloo need none."""
    if len(environment.hosts) == 1:
        return {}
    variables = {"NCCL_HOSTID": environment.current_host}  # the kernel's host names may all be the same
    plugin = find_plugin(os.environ)
    if not (plugin and find_efa_devices(sys_dir) and find_verbs_devices(dev_dir)):
        variables["NCCL_NET"] = "Socket"  # an aws-ofi-nccl plugin in the image would hang without EFA
    elif plugin == "libnccl-net-ofi.so":
        variables["NCCL_NET_PLUGIN"] = "ofi"  # by itself NCCL looks for libnccl-net.so alone
    interface = find_interface(environment)
    if interface:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return variables


def open_port(port: int) -> socket.socket:
    """Return a socket that listens on a port of this host. Raises UserError where the port cannot be had."""
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"Port {port} of this host, on which the job's hosts talk, cannot be opened ({quote_error(error)}): end "
            "what uses it, such as another job here, a second process with rank 0, or torchrun itself, which another "
            "--master-port suits (on SageMaker: leave `distributed` out of the ModelTrainer)."
        ) from error


def find_interface(environment: Environment) -> str | None:
    """Return the interface that SageMaker names, else the one that leads to another host.

    The SDK's local mode names an interface that does not exist. Where a launcher gives hosts no names, the
    first one's address stands for all. A loopback's does not: the others reach the first host by another one.
    """
    if environment.network_interface in psutil.net_if_addrs():
        return environment.network_interface
    if environment.placement.first_address:
        interface = find_interface_to(environment.first_address)
        return None if interface in LOOPBACKS else interface
    others = (host for host in environment.hosts if host != environment.current_host)
    return next(filter(None, map(find_interface_to, others)), None)


def find_interface_to(host: str) -> str | None:
    """Return the interface that leads to a host; None while the host's name is not known yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, DISCARD_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # UDP: chooses a route and sends nothing
            own_address = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own_address in {entry.address for entry in addresses}:
            return name
    return None
