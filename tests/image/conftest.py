# SPDX-License-Identifier: Apache-2.0
"""Runs the image that `make test-image` has built: whole jobs over a mounted /opt/ml, and single commands."""

import json
import os
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CONTAINER_TIMEOUT_SECONDS = 180


@dataclass(frozen=True)
class Image:
    """An image and the client that runs it."""

    docker: str
    name: str
    variant: str

    def run(self, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a container to its end; its output in `stdout`, errors with it."""
        container = f"llm-trainer-test-{uuid.uuid4().hex[:12]}"
        command = [self.docker, "run", "--rm", "--name", container, *options, self.name, *arguments]
        try:
            return subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=CONTAINER_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # Ending the client leaves the container running.
            subprocess.run([self.docker, "rm", "--force", container], check=False, capture_output=True)
            raise

    def run_job(self, base_dir: Path, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run the job of a tree, mounted where SageMaker mounts it."""
        return self.run(*arguments, options=[f"--volume={base_dir}:/opt/ml", *options])

    def run_bash(self, script: str, options: Sequence[str] = ()) -> str:
        """The output of a shell script in the image; it has to succeed."""
        result = self.run("-c", script, options=["--entrypoint=/bin/bash", *options])
        assert result.returncode == 0, result.stdout
        return result.stdout

    def inspect(self) -> dict[str, Any]:
        """What the image says of itself."""
        answer = subprocess.run([self.docker, "image", "inspect", self.name], check=True, capture_output=True)
        return json.loads(answer.stdout)[0]


@pytest.fixture(scope="session")
def image() -> Image:
    variant = os.environ.get("VARIANT", "cpu")
    name = os.environ.get("IMAGE", f"sagemaker-llm-trainer:{variant}")
    return Image(os.environ.get("DOCKER", "docker"), name, variant)


@pytest.fixture
def tree(make_tree):
    """A job's tree that any user may read and write, as the service's mounts are for root."""
    tree = make_tree()
    # Temporary folders, and the weights that safetensors writes, are their owner's alone.
    subprocess.run(["chmod", "--recursive", "a+rX", tree.base_dir], check=True)
    tree.base_dir.chmod(0o777)
    for name in ("model", "output", "checkpoints"):
        folder = tree.base_dir / name
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    return tree
