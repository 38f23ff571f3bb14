# SPDX-License-Identifier: Apache-2.0
"""Runs scripts of the SageMaker SDKs' users, each by its SDK's own Python, on the image that make has built."""

import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = os.environ.get("DOCKER", "docker")
IMAGE = os.environ.get("IMAGE", "sagemaker-llm-trainer:cpu")
JOB_TIMEOUT_SECONDS = 480  # the first import of an SDK compiles it
# Otherwise each call waits for AWS, to tell it of itself.
NO_TELEMETRY = "SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n"


@dataclass(frozen=True)
class LocalJob:
    """A script that has ended, what it said, and the folder in which the SDK ran the job."""

    exit_code: int
    log: str
    folder: Path

    def unpack(self, name: str) -> Path:
        """The files of an archive that the SDK left, in a folder of their own."""
        (archive,) = self.folder.rglob(name)
        unpacked = self.folder / f"unpacked-{name}"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        return unpacked


def docker(*arguments: str) -> str:
    return subprocess.run([DOCKER, *arguments], check=True, capture_output=True, text=True).stdout


def find_networks() -> set[str]:
    """The network that both SDKs make, by one name, and leave behind."""
    return set(docker("network", "ls", "--quiet", "--filter=name=^sagemaker-local$").split())


@pytest.fixture(scope="session")
def network():
    """Removes the SDKs' network, unless it was there before."""
    before = find_networks()
    yield
    for network in find_networks() - before:
        docker("network", "rm", network)


@pytest.fixture
def run_script(tree, tmp_path, network):
    """Runs a script on the tree's channels as a user would who has no account of AWS."""
    folder = tmp_path / f"job-{tmp_path.parent.name}-{tmp_path.name}"  # compose names the job's containers after it
    folder.mkdir()
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "docker").symlink_to(shutil.which(DOCKER))
    (tmp_path / "sagemaker.yaml").write_text(NO_TELEMETRY)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHON"))} | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SAGEMAKER_USER_CONFIG_OVERRIDE": str(tmp_path / "sagemaker.yaml"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }

    def run(script: str, instances: int = 1) -> LocalJob:
        python = ROOT / f".venv-{script.split('_')[-1]}/bin/python"
        command = [python, Path(__file__).with_name(f"{script}.py"), IMAGE, tree.base_dir / "input/data", folder]
        result = subprocess.run(
            [*command, str(instances)],
            cwd=tmp_path,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_TIMEOUT_SECONDS,
            check=False,
        )
        return LocalJob(result.returncode, result.stdout, folder)

    yield run
    for file in folder.rglob("docker-compose.yaml"):
        label = f"--filter=label=com.docker.compose.project.config_files={file}"
        for container in docker("ps", "--all", "--quiet", label).split():
            docker("rm", "--force", container)
