# SPDX-License-Identifier: Apache-2.0
"""The job as SageMaker describes it to a training container: paths, channels, hosts and devices.

It reads files. The environment decides only where there is no SageMaker: placement.py has the hosts then, and two
variables the folders.

Source: "How Amazon SageMaker AI provides training information", the developer guide.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.common.files import check_access, find_barrier, read_json_object
from llm_trainer.config.placement import Placement, read_placement

DEFAULT_BASE_DIR = "/opt/ml"
MEMBERS = "LLM_TRAINER_MEMBERS"  # a JSON array, for the workers of a job that may go on with fewer hosts
BASE_DIR, DATA_DIR = "SAGEMAKER_BASE_DIR", "LLM_TRAINER_DATA_DIR"  # of --output-dir and --data-dir (cli/folders.py)
# EC2 names instances with NVIDIA GPUs p... and g...; a host cannot look for the devices of another group's hosts.
GPU_INSTANCE = re.compile(r"(ml\.)?[pg]\d")
WHOLE_CHANNELS = ("model", "adapter", "teacher", "config", "rewards")  # every host needs every file of these
PRICE_FILE = "prices.json"  # in the channel `config`, with settings or without


@dataclass(frozen=True)
class Environment:
    """A host's view of the job, as SageMaker describes it in files."""

    base_dir: Path
    hyperparameters: dict[str, Any]  # as SageMaker wrote them: nearly always strings
    channels: dict[str, Path]
    sharded_channels: frozenset[str]  # each host has a part of their files
    hosts: tuple[str, ...]  # the hosts that train; a host's position is its node rank
    other_hosts: tuple[str, ...]  # hosts in the other groups of a heterogeneous cluster, which wait
    current_host: str
    network_interface: str | None
    instance_type: str | None
    num_gpus: int
    num_cpus: int
    checkpoint_dir: Path
    placement: Placement = field(default_factory=Placement)

    @property
    def first_address(self) -> str:
        """The name or address at which the other hosts reach the first one."""
        return self.placement.first_address or self.hosts[0]

    @property
    def num_billed_hosts(self) -> int:
        """The number of hosts that AWS bills, whether they train or wait."""
        return len(self.hosts) + len(self.other_hosts)

    @property
    def trains(self) -> bool:
        """True on a host that takes part in the training."""
        return self.current_host in self.hosts

    @property
    def runs_on_sagemaker(self) -> bool:
        """True in a job of SageMaker or its local mode, which keep certain folders and no others."""
        return self.instance_type is not None

    @property
    def model_dir(self) -> Path:
        """The folder that SageMaker uploads as the model."""
        return self.base_dir / "model"

    @property
    def output_dir(self) -> Path:
        """The folder that SageMaker uploads as the output, with the failure file."""
        return self.base_dir / "output"

    @property
    def node_rank(self) -> int:
        """The position of this host among those that train. Raises ValueError on a host that waits."""
        return self.hosts.index(self.current_host)


def find_base_dir() -> Path:
    """Return /opt/ml, or the stand-in that SAGEMAKER_BASE_DIR names in tests and trials."""
    return Path(os.environ.get(BASE_DIR, DEFAULT_BASE_DIR)).absolute()


def read_environment() -> Environment:
    """Read the SageMaker input tree. Every file of it is optional, since a plain `docker run` has none.

    Raises UserError when a file is there but is not the JSON object that SageMaker documents. The same where the
    variables of another launcher cannot be true.
    """
    base_dir = find_base_dir()
    config_dir = base_dir / "input" / "config"
    resources = read_json_object(config_dir / "resourceconfig.json")
    placement = find_placement()
    if placement.num_nodes > 1:
        resources = {"hosts": [*placement.hosts], "current_host": placement.hosts[placement.node_rank]}
    all_hosts = read_hosts(resources)
    hosts = read_members() or choose_training_group(read_groups(resources), all_hosts)
    input_data_config = read_json_object(config_dir / "inputdataconfig.json")
    return Environment(
        base_dir=base_dir,
        hyperparameters=read_json_object(config_dir / "hyperparameters.json"),
        channels=find_channels(base_dir, input_data_config),
        sharded_channels=find_sharded_channels(input_data_config, len(hosts)),
        hosts=hosts,
        other_hosts=tuple(host for host in all_hosts if host not in hosts),
        current_host=resources.get("current_host", all_hosts[0]),
        network_interface=read_name(resources, "network_interface_name"),
        instance_type=read_name(resources, "current_instance_type"),
        num_gpus=count_gpus(),
        num_cpus=len(os.sched_getaffinity(0)),
        checkpoint_dir=find_checkpoint_dir(base_dir, read_json_object(config_dir / "checkpointconfig.json")),
        placement=placement,
    )


def find_placement() -> Placement:
    """Return where a launcher has put this process. Raises UserError where its variables cannot be true."""
    resources = read_json_object(find_base_dir() / "input" / "config" / "resourceconfig.json")
    return read_placement(os.environ, on_sagemaker=bool(resources))


def read_hosts(resources: dict[str, Any]) -> list[str]:
    """Return all hosts of the job, in the order of resourceconfig.json. Raises UserError where they are wrong."""
    hosts = resources.get("hosts") or ["localhost"]
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise UserError(f"resourceconfig.json has hosts={cut_quote(repr(hosts))}: write a list of host names.")
    current_host = resources.get("current_host", hosts[0])
    if current_host not in hosts:
        raise UserError(
            f"resourceconfig.json names current_host={cut_quote(repr(current_host))}, which is not one of its hosts "
            f"{cut_quote(repr(hosts))}: "
            "list every host of the job under 'hosts'."
        )
    return hosts


def read_members() -> tuple[str, ...]:
    """Return the hosts of this attempt, as the launcher tells its workers; none in the launcher itself."""
    return tuple(json.loads(os.environ.get(MEMBERS, "[]")))


def read_name(resources: dict[str, Any], key: str) -> str | None:
    """Return a name in resourceconfig.json, None where there is none. Raises UserError where it is no text."""
    value = resources.get(key)
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"resourceconfig.json has {key}={cut_quote(repr(value))}: write a text, or leave it out.")


def read_groups(resources: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the instance groups, each with its type, perhaps "", and its hosts. Raises UserError for other things."""
    groups = resources.get("instance_groups") or []
    for group in groups if isinstance(groups, list) else [groups]:
        hosts = group.get("hosts") or [] if isinstance(group, dict) else None
        if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
            raise UserError(
                f"resourceconfig.json has the instance group {cut_quote(repr(group))}: write an object with "
                "'instance_type' and a list of 'hosts'."
            )
    return [{"instance_type": read_name(group, "instance_type") or "", "hosts": group.get("hosts")} for group in groups]


def choose_training_group(groups: list[dict[str, Any]], all_hosts: list[str]) -> tuple[str, ...]:
    """Return the hosts that train: all, or the largest group with GPUs of a heterogeneous cluster.

    The first group counts where several are equally large.
    """
    with_gpus = [group for group in groups if GPU_INSTANCE.match(group["instance_type"])]
    candidates: list[list[str]] = [group["hosts"] for group in with_gpus or groups if group["hosts"]]
    if len(groups) < 2 or not candidates:
        return tuple(all_hosts)
    return tuple(max(candidates, key=len))  # type: ignore[arg-type]


def find_checkpoint_dir(base_dir: Path, checkpoint_config: dict[str, Any]) -> Path:
    """Return the folder that SageMaker synchronizes with S3: the job's CheckpointConfig.LocalPath, or the default."""
    local_path = checkpoint_config.get("LocalPath")
    if local_path and not isinstance(local_path, str):
        raise UserError(f"checkpointconfig.json has LocalPath={cut_quote(repr(local_path))}: write a folder's path.")
    return Path(local_path) if local_path else base_dir / "checkpoints"


def find_channels(base_dir: Path, input_data_config: dict[str, Any]) -> dict[str, Path]:
    """Return the folder of each channel, by name: of those that SageMaker lists, and of those that are there.

    Raises UserError for a channel in Pipe mode, and where this user may not list the channels.
    """
    data_dir = Path(os.environ.get(DATA_DIR, base_dir / "input" / "data"))
    names = set(input_data_config)
    check_access(data_dir)
    if data_dir.is_dir():
        names |= {entry.name for entry in data_dir.iterdir() if os.path.isdir(entry) or find_barrier(entry)}
    if piped := find_channels_with(input_data_config, "TrainingInputMode", "Pipe"):
        raise UserError(
            f"Channel {', '.join(piped)} uses TrainingInputMode=Pipe, which cannot be read twice: use File or FastFile "
            "mode."
        )
    return {name: data_dir / name for name in sorted(names)}


def find_sharded_channels(input_data_config: dict[str, Any], num_hosts: int) -> frozenset[str]:
    """Return the channels whose files SageMaker distributes over the hosts.

    Raises UserError for a channel that every host needs whole.
    """
    if num_hosts == 1:  # a single host has all files
        return frozenset()
    sharded = find_channels_with(input_data_config, "S3DistributionType", "ShardedByS3Key")
    if broken := [name for name in sharded if name in WHOLE_CHANNELS]:
        raise UserError(
            f"Channel {', '.join(broken)} uses S3DistributionType=ShardedByS3Key, and every host needs all of its "
            "files: use FullyReplicated; only channels with data may be sharded."
        )
    return frozenset(sharded)


def find_channels_with(input_data_config: dict[str, Any], key: str, value: str) -> list[str]:
    """Return the names of the channels whose configuration has this value."""
    channels = input_data_config.items()
    return sorted(name for name, channel in channels if isinstance(channel, dict) and channel.get(key) == value)


def count_gpus() -> int:
    """Return the number of GPUs that this process may use, by NVML: torch would load CUDA into the launcher."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        num_gpus = pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_gpus
    return min(num_gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
