# SPDX-License-Identifier: Apache-2.0
"""Runs the image that `make test-image` has built: whole jobs over a mounted /opt/ml, and single commands."""

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CONTAINER_TIMEOUT_SECONDS = 500  # a guard against what hangs


@dataclass(frozen=True)
class Container:
    """A job that runs, or has ended and is not removed yet."""

    docker: str
    name: str

    def call(self, *arguments: str) -> str:
        command = [self.docker, *arguments, self.name]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def log(self) -> str:
        return self.call("logs")

    def wait_for(self, text: str) -> None:
        """Return when the log holds the text."""
        deadline = time.monotonic() + CONTAINER_TIMEOUT_SECONDS
        while text not in self.log():
            assert time.monotonic() < deadline, f"the job did not say {text!r}:\n{self.log()}"
            time.sleep(0.5)

    def end(self) -> int:
        """Wait for the job's end; its exit code."""
        return int(self.call("wait"))

    def stop(self, grace_seconds: int) -> int:
        """Stop it as SageMaker does; its exit code."""
        self.call("stop", f"--time={grace_seconds}")
        return self.end()


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

    @contextlib.contextmanager
    def start(self, base_dir: Path, *arguments: str, options: Sequence[str] = ()) -> Iterator["Container"]:
        """A running job, which is removed at the end."""
        name = f"llm-trainer-test-{uuid.uuid4().hex[:12]}"
        volume = f"--volume={base_dir}:/opt/ml"
        command = [self.docker, "run", "--detach", "--name", name, volume, *options, self.name, *arguments]
        subprocess.run(command, check=True, capture_output=True)
        try:
            yield Container(self.docker, name)
        finally:
            subprocess.run([self.docker, "rm", "--force", name], check=False, capture_output=True)

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
