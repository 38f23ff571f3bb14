# SPDX-License-Identifier: Apache-2.0
"""An /opt/ml tree as SageMaker lays it out, with a job that a test can run and change."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from support.waiting import GUARD_SECONDS, wait_until

LLM_TRAINER = Path(sys.executable).with_name("llm-trainer")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"{a + b}"},
        ]
    }
    for a in range(8)
    for b in range(4)
]
HOSTS = ["127.0.0.1", "127.0.0.2"]  # of one job
# A job of four steps on the tiny model.
HYPERPARAMETERS = {
    "learning_rate": "0.01",
    "num_train_epochs": "1",
    "per_device_train_batch_size": "8",
    "logging_steps": "1",
    "lora_dropout": "0.0",
}


@dataclass
class SageMakerTree:
    """Where a container would find /opt/ml."""

    base_dir: Path
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, path: str, content: Any) -> Path:
        """Write a file below the tree; anything but text and bytes as JSON."""
        file = self.base_dir / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    def write_job(self, hyperparameters: dict[str, str], channels: tuple[str, ...]) -> None:
        """The three configuration files, as SageMaker writes them."""
        channel = {
            "TrainingInputMode": "File",
            "S3DistributionType": "FullyReplicated",
            "RecordWrapperType": "None",
        }
        self.write("input/config/hyperparameters.json", hyperparameters)
        self.write("input/config/inputdataconfig.json", dict.fromkeys(channels, channel))
        self.write(
            "input/config/resourceconfig.json",
            {
                "current_host": "algo-1",
                "current_instance_type": "ml.c5.xlarge",
                "current_group_name": "homogeneousCluster",
                "hosts": ["algo-1"],
                "instance_groups": [
                    {
                        "instance_group_name": "homogeneousCluster",
                        "instance_type": "ml.c5.xlarge",
                        "hosts": ["algo-1"],
                    }
                ],
                "network_interface_name": "eth0",
            },
        )

    def give_many_rows(self) -> None:
        """Training data that takes a while to tokenize, and a cache of the tree's own."""
        row = {"text": "many words " * 50}
        self.write("input/data/train/many.jsonl", f"{json.dumps(row)}\n" * 500_000)
        self.environment["SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY"] = str(self.base_dir / "cache")

    def wait_for_tokens(self) -> None:
        """Return when rows are being tokenized, in the cache of `give_many_rows`."""
        wait_until(lambda: any(file.stat().st_size for file in self.base_dir.glob("cache/*/*/data/.*/rows.arrow")))

    def change(self, **hyperparameters: str | None) -> None:
        """Set hyperparameters, or remove those that are None."""
        file = self.base_dir / "input/config/hyperparameters.json"
        merged = json.loads(file.read_text()) | hyperparameters
        self.write("input/config/hyperparameters.json", {k: v for k, v in merged.items() if v is not None})

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the job as the container would, its output in `stdout`, errors with it."""
        return subprocess.run(
            [str(LLM_TRAINER), "train", *arguments],
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(self.base_dir), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=GUARD_SECONDS,
            check=False,
        )

    def start(self, *arguments: str, command: Sequence[str] = ()) -> "RunningJob":
        """Start the job as the container would, or by another command that does so."""
        process = subprocess.Popen(
            [*command] or [str(LLM_TRAINER), "train", *arguments],
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(self.base_dir), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return RunningJob(process)

    @property
    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints there are, in order."""
        return sorted(int(folder.name.split("-")[1]) for folder in (self.base_dir / "checkpoints").glob("checkpoint-*"))

    @property
    def failure(self) -> str:
        return (self.base_dir / "output/failure").read_text(encoding="utf-8")

    @property
    def model_files(self) -> set[str]:
        folder = self.base_dir / "model"
        return {file.name for file in folder.iterdir()} if folder.exists() else set()

    def read_journal(self) -> list[dict[str, Any]]:
        """All records of output/data/metrics.jsonl."""
        lines = (self.base_dir / "output/data/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.base_dir / "model/training_manifest.json").read_text())


class RunningJob:
    """A job's process, and its log as far as it was read."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.log = ""

    def wait_for(self, text: str) -> None:
        """Return when a line of the log holds the text."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line
            if text in line:
                return
        raise AssertionError(f"the job ended before it said {text!r}:\n{self.log}")

    def end(self) -> int:
        """Read the log to its end; the exit code."""
        self.log += self.process.communicate(timeout=GUARD_SECONDS)[0]
        return self.process.returncode

    def workers(self) -> list[psutil.Process]:
        """Return the workers: the children of torchrun, or of the single worker's starter, which are the launcher's."""
        children = psutil.Process(self.process.pid).children()
        (starter,) = [
            child
            for child in children
            if {"llm_trainer.launcher.torchrun", "llm_trainer.launcher.single_worker"} & {*child.cmdline()}
        ]
        return starter.children()


def metrics_of(log: str, key: str) -> list[float]:
    """Every value of a key on the log's metric lines."""
    lines = [line for line in log.splitlines() if "; " in line and f"{key}=" in line]
    pairs = [pair.partition("=") for line in lines for pair in line.split("; ")]
    return [float(value) for name, _, value in pairs if name == key]


def finish(tree: "SageMakerTree") -> str:
    """Run a tree's job, which has to succeed, and return its log."""
    result = tree.run()
    assert result.returncode == 0, result.stdout
    return result.stdout


def read_weights(tree: "SageMakerTree") -> dict[str, bytes]:
    """Return the bytes of the weights in a job's result, by their files."""
    return {file.name: file.read_bytes() for file in (tree.base_dir / "model").glob("*.safetensors")}
