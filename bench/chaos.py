# SPDX-License-Identifier: Apache-2.0
"""Kills a small job at random moments, starts it again after each kill, and compares its end with an undisturbed run.

    .venv/bin/python bench/chaos.py [KILLS] [SEED] [METHOD]

A third of the kills come at any time from the start on, a third once it trains, a third while a checkpoint is written.
Each is a SIGTERM to the launcher, as SageMaker stops a job, a SIGKILL to it, as the end of an instance, or a SIGKILL to
a worker. Prints a line a kill and a summary; the exit code is 0 only if the weights are the very same in the end.
"""

import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.sagemaker_tree import HYPERPARAMETERS, ROWS, RunningJob, SageMakerTree
from support.tiny_model import build_tiny_model

RANKS = 2
SETTINGS = {
    **HYPERPARAMETERS,
    "nproc_per_node": str(RANKS),
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "num_train_epochs": "350",
    "lora_dropout": "0.2",
    "save_steps": "3",
    "logging_steps": "50",
    "eval_strategy": "no",
}
# By method: the rows, and settings that differ.
PAIRS = [
    {
        "prompt": f"What is {number} plus 1?",
        "chosen": f"{number + 1} it is",
        "rejected": f"{number} " * (number % 3 + 1),
    }
    for number in range(24)
]
METHODS = {"sft": (ROWS, {}), "dpo": (PAIRS, {"lora_dropout": "0"})}
START_SECONDS = 12.0


def make_tree(folder: Path, model: Path, method: str) -> SageMakerTree:
    rows, settings = METHODS[method]
    tree = SageMakerTree(folder, {"OMP_NUM_THREADS": "1"})
    shutil.copytree(model, folder / "input/data/model")
    tree.write("input/data/train/train.json", rows)
    tree.write_job({**SETTINGS, **settings, "method": method}, ("model", "train"))
    return tree


def wait_for_moment(kind: str, tree: SageMakerTree, job: RunningJob, chance: random.Random) -> None:
    """Return at a random moment of a kind, or when the job has ended."""
    if kind == "any time":
        deadline = time.monotonic() + chance.uniform(0, 1.25 * START_SECONDS)
        while job.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return
    before = set(tree.checkpoints)
    partial = tree.base_dir / "checkpoints/.partial"
    while job.process.poll() is None and set(tree.checkpoints) <= before:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 2))
    if kind == "writing":
        while job.process.poll() is None and not partial.exists():
            pass
        time.sleep(chance.uniform(0, 0.03))  # a checkpoint takes about as long


def kill(how: str, job: RunningJob) -> None:
    launcher = psutil.Process(job.process.pid)
    workers = [child for child in launcher.children(recursive=True) if "llm_trainer.worker" in child.cmdline()]
    if how == "KILL to a worker" and workers:
        workers[-1].kill()
    elif how == "TERM":
        launcher.send_signal(signal.SIGTERM)
    else:
        launcher.kill()


def run_to_end(tree: SageMakerTree) -> None:
    job = tree.start()
    log = "".join(job.process.stdout)
    if job.process.wait() != 0:
        sys.exit(f"the job failed:\n{log}")


def adapters_are_equal(first: SageMakerTree, second: SageMakerTree) -> bool:
    one, other = (load_file(tree.base_dir / "model/adapter_model.safetensors") for tree in (first, second))
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def main(num_kills: int = 36, seed: int = 0, method: str = "sft") -> int:
    chance = random.Random(seed)
    stop_seconds = []
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_model(Path(folder) / "model")
        whole, killed = (make_tree(Path(folder) / name, model, method) for name in ("whole", "killed"))
        run_to_end(whole)
        for number in range(1, num_kills + 1):
            kind = chance.choice(["any time", "training", "writing"])
            how = chance.choice(["TERM", "KILL", "KILL to a worker"])
            job = killed.start()
            wait_for_moment(kind, killed, job, chance)
            if job.process.poll() is not None:
                sys.exit(f"kill {number}: the job ended before it, with {job.end()}:\n{job.log}")
            steps = killed.checkpoints
            started = time.monotonic()
            kill(how, job)
            exit_code = job.end()
            if how == "TERM":
                stop_seconds.append(time.monotonic() - started)
                if exit_code != 0:
                    sys.exit(f"a stopped job ended with {exit_code}:\n{job.log}")
            print(f"kill {number}: {how}, {kind}, after checkpoint {steps[-1:]}; exit code {exit_code}", flush=True)
        run_to_end(killed)
        same = adapters_are_equal(whole, killed)
    print(f"kills survived: {num_kills} of {num_kills}; final weights equal those of the undisturbed run: {same}")
    if stop_seconds:
        print(
            f"seconds from SIGTERM to exit, {RANKS} ranks, {len(stop_seconds)} stops: "
            f"median {statistics.median(stop_seconds):.1f}, worst {max(stop_seconds):.1f}"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]))
