# SPDX-License-Identifier: Apache-2.0
"""What SageMaker tells a training container: paths, channels, hosts and devices. Reads files only, never torch.

Source: "How Amazon SageMaker AI provides training information", the developer guide.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.errors import UserError

DEFAULT_BASE_DIR = "/opt/ml"


@dataclass(frozen=True)
class Environment:
    """One host's view of the job."""

    base_dir: Path
    hyperparameters: dict[str, Any]  # as SageMaker wrote them: nearly always strings
    channels: dict[str, Path]
    hosts: tuple[str, ...]  # a host's position is its node rank
    current_host: str
    network_interface: str | None
    num_gpus: int
    num_cpus: int

    @property
    def model_dir(self) -> Path:
        return self.base_dir / "model"

    @property
    def output_dir(self) -> Path:
        return self.base_dir / "output"

    @property
    def checkpoint_dir(self) -> Path:
        return self.base_dir / "checkpoints"

    @property
    def node_rank(self) -> int:
        return self.hosts.index(self.current_host)


def find_base_dir() -> Path:
    """/opt/ml, or a stand-in tree in tests and trials."""
    return Path(os.environ.get("SAGEMAKER_BASE_DIR", DEFAULT_BASE_DIR)).absolute()


def read_environment() -> Environment:
    """Read the SageMaker input tree. Every file of it is optional, so that a plain `docker run` works too.

    Raises UserError when a file is there but is not the JSON object that SageMaker documents.
    """
    base_dir = find_base_dir()
    config_dir = base_dir / "input" / "config"
    resources = read_json_object(config_dir / "resourceconfig.json")
    hosts = tuple(resources.get("hosts", ["localhost"]))
    current_host = resources.get("current_host", hosts[0])
    if current_host not in hosts:
        raise UserError(
            f"resourceconfig.json names current_host={current_host!r}, which is not one of its hosts {list(hosts)}: "
            "list every host of the job under 'hosts'."
        )
    return Environment(
        base_dir=base_dir,
        hyperparameters=read_json_object(config_dir / "hyperparameters.json"),
        channels=find_channels(base_dir, read_json_object(config_dir / "inputdataconfig.json")),
        hosts=hosts,
        current_host=current_host,
        network_interface=resources.get("network_interface_name"),
        num_gpus=count_gpus(),
        num_cpus=len(os.sched_getaffinity(0)),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): write it as one JSON object.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}: write it as one JSON object.")
    return value


def find_channels(base_dir: Path, input_data_config: dict[str, Any]) -> dict[str, Path]:
    """Channel name -> its folder: the channels SageMaker lists, or the folders there are when it lists none."""
    data_dir = base_dir / "input" / "data"
    names = set(input_data_config)
    if data_dir.is_dir():
        names |= {entry.name for entry in data_dir.iterdir() if entry.is_dir()}
    piped = sorted(
        name
        for name, channel in input_data_config.items()
        if isinstance(channel, dict) and channel.get("TrainingInputMode") == "Pipe"
    )
    if piped:
        raise UserError(
            f"Channel {', '.join(piped)} uses TrainingInputMode=Pipe, which cannot be read twice: "
            "use File or FastFile mode."
        )
    return {name: data_dir / name for name in sorted(names)}


def count_gpus() -> int:
    """GPUs that this process may use, from NVML: asking torch would load CUDA into the launcher."""
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
