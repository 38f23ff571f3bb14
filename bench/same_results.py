# SPDX-License-Identifier: Apache-2.0
"""Prove that a change of the code's structure changed no result: losses and weights of six jobs, bit for bit.

    python bench/same_results.py MODEL >before.json             # on the commit before the change
    python bench/same_results.py MODEL --against before.json    # after it, on the same machine

MODEL is the demo's model folder, `.demo/opt/ml/input/data/model`. Each job has one thread a process, a fixed seed and
a tree of its own. The second form prints what differs and exits with 1 where anything does.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATASET = Path(__file__).parents[1] / "examples/demo/dataset"
# The demo's, in the words that both sides of the change know.
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
    "logging_steps": "1",
    "seed": "7",
}
SHORT = {"max_steps": "4", "sample_prompts": "0"}
JOBS: dict[str, dict[str, str]] = {
    "demo": {},
    "qlora": {**SHORT, "load_in_4bit": "true", "lora_dropout": "0.1"},
    "fsdp2": {**SHORT, "nproc_per_node": "2", "distribution": "fsdp"},
    "merge": {**SHORT, "merge_weights": "true"},
    "full": {**SHORT, "use_peft": "false", "learning_rate": "0.0001"},
    "resumed": {**SHORT, "max_steps": "6", "save_steps": "3", "lora_dropout": "0.1"},
}


def lay_out(base_dir: Path, model: Path, hyperparameters: dict[str, str]) -> None:
    """Write the input tree of a job on one host without GPU."""
    data, config = base_dir / "input/data", base_dir / "input/config"
    for channel in ("train", "validation"):
        (data / channel).mkdir(parents=True)
        shutil.copy(DATASET / f"{channel}.jsonl", data / channel)
    (data / "model").symlink_to(model.absolute())
    config.mkdir(parents=True)
    channels = {name: {"TrainingInputMode": "File"} for name in ("train", "validation", "model")}
    resources = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
    files = {"hyperparameters": hyperparameters, "inputdataconfig": channels, "resourceconfig": resources}
    for name, content in files.items():
        (config / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def run_job(base_dir: Path) -> None:
    """Train in the tree. Raises CalledProcessError with the log printed where the job fails."""
    variables = {"SAGEMAKER_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llm_trainer", "train"]
    subprocess.run(command, env=os.environ | variables, check=True, stdout=sys.stderr)


def read_results(base_dir: Path) -> dict[str, Any]:
    """Return every loss that the journal holds, in order, and the digest of each file of weights."""
    records = [json.loads(line) for line in (base_dir / "output/data/metrics.jsonl").read_text("utf-8").splitlines()]
    kept = ("loss", "grad_norm", "accuracy", "learning_rate")
    losses = [
        {name: value for name, value in record["values"].items() if name.endswith(kept)}
        for record in records
        if record["kind"] == "metrics"
    ]
    files = sorted((base_dir / "model").rglob("*.safetensors"))
    digests = {
        str(file.relative_to(base_dir / "model")): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    return {"losses": losses, "weights": digests}


def run_case(name: str, model: Path) -> dict[str, Any]:
    """Run one job of JOBS in a new tree; the resumed one a second time, from its checkpoint in the middle."""
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        base_dir = Path(folder)
        lay_out(base_dir, model, HYPERPARAMETERS | JOBS[name])
        run_job(base_dir)
        if name == "resumed":
            shutil.rmtree(base_dir / "checkpoints/checkpoint-6")
            shutil.rmtree(base_dir / "model")
            run_job(base_dir)
        return read_results(base_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the demo's model")
    parser.add_argument("--against", type=Path, help="what this program printed before the change")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS), help="only these")
    arguments = parser.parse_args()
    results = {name: run_case(name, arguments.model) for name in arguments.jobs}
    if arguments.against is None:
        print(json.dumps(results, indent=1))
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    differing = [name for name in results if results[name] != before[name]]
    for name in results:
        count = f"{len(results[name]['losses'])} losses, {len(results[name]['weights'])} files of weights"
        print(f"{name}: {'DIFFERS' if name in differing else 'equal'} ({count})")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
