# SPDX-License-Identifier: Apache-2.0
"""The tree that a container of a job will find below /opt/ml, laid out on this machine: checks run on it.

Channels of this machine are links in it, and those in S3 are empty folders.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llm_trainer.common.files import write_verbatim
from llm_trainer.config.environment import BASE_DIR, DATA_DIR, DEFAULT_BASE_DIR
from llm_trainer.config.plain_values import PATHS

CONTAINER_DATA = f"{DEFAULT_BASE_DIR}/input/data"


@contextmanager
def lay_out_tree(
    hyperparameters: Mapping[str, str],
    places: Mapping[str, Path | None],
    inputs: Mapping[str, Mapping[str, str]],
    instance_type: str,
    num_hosts: int,
) -> Iterator[Path]:
    """Give the folder of such a tree, which is removed after the block.

    `places` are the channels, None for S3, and `inputs` is what inputdataconfig.json says of them.
    """
    with tempfile.TemporaryDirectory(prefix="llm-trainer-job-") as name:
        folder = Path(name)
        data, config = folder / "input/data", folder / "input/config"
        data.mkdir(parents=True)
        config.mkdir()
        for channel, place in places.items():
            link_channel(data / channel, place)
        hosts = [f"algo-{number + 1}" for number in range(num_hosts)]
        resources = {"current_host": hosts[0], "hosts": hosts, "current_instance_type": instance_type}
        moved = {
            key: value.replace(CONTAINER_DATA, str(data)) if key in PATHS else value
            for key, value in hyperparameters.items()
        }
        # Verbatim: a secret is refused in another sentence than one about three asterisks.
        for file, value in (("resourceconfig", resources), ("inputdataconfig", inputs), ("hyperparameters", moved)):
            write_verbatim(config / f"{file}.json", json.dumps(value))
        yield folder


def link_channel(channel: Path, place: Path | None) -> None:
    """Make a channel's folder in the tree: a link, a folder with a link to the only file, or an empty folder."""
    if place is not None and place.is_dir():
        channel.symlink_to(place.absolute())
        return
    channel.mkdir()
    if place is not None:
        (channel / place.name).symlink_to(place.absolute())


@contextmanager
def stand_in(tree: Path) -> Iterator[None]:
    """Have this process take the tree for /opt/ml within the block."""
    kept = {name: os.environ.pop(name, None) for name in (BASE_DIR, DATA_DIR)}
    os.environ[BASE_DIR] = str(tree)
    try:
        yield
    finally:
        del os.environ[BASE_DIR]
        os.environ.update({name: value for name, value in kept.items() if value is not None})
