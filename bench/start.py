# SPDX-License-Identifier: Apache-2.0
"""From the start of the process to the first optimizer step, phase by phase, beside what no training can do without.

    .venv/bin/python bench/start.py .demo/opt/ml [ROUNDS]

The floor is a process of its own that imports what TRL's trainer needs and loads the weights. Both in turns: cold,
after the kernel has forgotten every file (as root; else that half is left out) and without tokenized rows; then warm.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from job import build, write_prompts

FLOOR = """
import sys
for name in ("wandb", "mlflow", "bitsandbytes", "liger_kernel", "deepspeed", "vllm"):
    sys.modules[name] = None  # TRL, Transformers and PEFT would import them for nothing
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""
FORGET = Path("/proc/sys/vm/drop_caches")


def main() -> None:
    model, rounds = Path(sys.argv[1]).absolute() / "input/data/model", int(sys.argv[2]) if len(sys.argv) > 2 else 5
    states = ("cold", "warm") if os.access(FORGET, os.W_OK) else ("warm",)
    starts: dict[str, list[dict[str, float]]] = {state: [] for state in states}
    floors: dict[str, list[float]] = {state: [] for state in states}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
            start(model, Path(name))  # rows are tokenized, files are read: what `warm` finds, and `cold` does not
            for state in states:
                forget(state, Path(name))
                floors[state].append(measure_floor(model))
                forget(state, Path(name))
                starts[state].append(start(model, Path(name)))
                print(state, starts[state][-1], f"floor {floors[state][-1]:.2f}", flush=True)
    report(starts, floors)


def forget(state: str, folder: Path) -> None:
    if state == "cold":
        shutil.rmtree(folder / "cache", ignore_errors=True)
        os.sync()
        FORGET.write_text("1")


def measure_floor(model: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR, model], check=True, capture_output=True)
    return time.perf_counter() - started


def start(model: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase of a job of one step."""
    output = folder / "output"
    command, variables = build("llm-trainer", model, write_prompts(folder / "train.jsonl"), output, folder)
    variables |= {"SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(folder / "cache")}
    options = ["--max_steps", "1", "--sample_prompts", "0"]
    run = subprocess.run([*command, *options], env=os.environ | variables, capture_output=True, text=True)
    shutil.rmtree(output)
    found = re.search(r"First step done .* after the start: (.*)", run.stdout)
    if run.returncode or not found:
        sys.exit(run.stdout + run.stderr)
    return {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", found[1])}


def report(starts: dict[str, list[dict[str, float]]], floors: dict[str, list[float]]) -> None:
    for state, runs in starts.items():
        print(f"{state}: floor {statistics.median(floors[state]):.2f} s")
        for phase in runs[0]:
            print(f"  {phase}: {statistics.median(run[phase] for run in runs):.2f} s")
        before = [sum(run.values()) - run["first_step"] for run in runs]
        for what, seconds in (("before", before), ("with", [sum(run.values()) for run in runs])):
            ratios = [own / floor for own, floor in zip(seconds, floors[state], strict=True)]
            print(
                f"  {what} the first step: {statistics.median(seconds):.2f} s, of the floor "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
