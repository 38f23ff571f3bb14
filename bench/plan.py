# SPDX-License-Identifier: Apache-2.0
"""The plan of a job beside what it took, on this machine's CPU: memory, the time of a step and of the whole job.

    .venv/bin/python bench/plan.py .demo/opt/ml [WORD ...]

One job on the tree's model and rows of this program's own calibrates, as `llm-trainer plan --learn` takes it over. Then
come jobs of other shapes, or those whose name holds one of the words. Wanted: memory within 5 %, time within 10 %.
Memory is the peak of tensors, planned for the batches that data and seed make. A run of its own reads it every 5 ms,
which slows its steps. Time is counted up to the export.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooks import hook_worker, lay_hooks

from llm_trainer.planning.learning import Lesson, read_lesson

CALIBRATION = {"per_device_train_batch_size": 4, "max_steps": 10}
JOBS: dict[str, Mapping[str, Any]] = {
    "single rows": {"per_device_train_batch_size": 1, "max_steps": 24},
    "large batches": {"per_device_train_batch_size": 16, "max_steps": 5},
    "recomputed": {**CALIBRATION, "gradient_checkpointing": True},
    "all weights": {**CALIBRATION, "use_peft": False},
    "two batches a step, rank 64": {**CALIBRATION, "gradient_accumulation_steps": 2, "lora_r": 64, "max_steps": 6},
}
NUM_ROWS = 200
DENSE = hook_worker(
    "llm_trainer.train",
    """
from llm_trainer.model.memory import peak
peak.WATCH_SECONDS, peak.IDLE_TIMES = 0.005, 1
""",
)
FIXED = {"use_checkpoints": False, "sample_prompts": 0, "eval_strategy": "no", "use_cpu": True}


def main(tree: Path, words: list[str]) -> None:
    lesson = read_lesson(run_job(tree, CALIBRATION))
    assert isinstance(lesson, Lesson), lesson
    print(f"calibration: a step took {lesson.step_share:.2f} of its plan, the start {lesson.start_share:.2f}\n")
    print("| job | memory, MiB | off | a step, s | off | until the export, s | off |", "|---|" + "---|" * 6, sep="\n")
    for name, settings in JOBS.items():
        if not words or any(word in name for word in words):
            dense, timed = (read_compared(run_job(tree, settings, hooks)) for hooks in (DENSE, ""))
            print(describe(name, dense["actual"]["memory_bytes"], timed, lesson), flush=True)


def run_job(tree: Path, settings: Mapping[str, Any], hooks: str = "") -> Path:
    """Run a job on the model of a tree, in processes that begin with these hooks. Return the folder of its manifest."""
    base = Path(tempfile.mkdtemp(prefix="bench-plan-"))
    (base / "input/data/train").mkdir(parents=True)
    (base / "input/data/model").symlink_to((tree / "input/data/model").resolve())
    write_rows(base / "input/data/train/train.jsonl")
    words = [f"--{name}={value}" for name, value in {**FIXED, **settings}.items()]
    command = [sys.executable, "-m", "llm_trainer", "train", *words]
    variables = {**os.environ, "SAGEMAKER_BASE_DIR": str(base), **lay_hooks(base / "hooks", hooks)}
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stdout[-3000:] + run.stderr[-1000:])
    return base / "model"


def write_rows(file: Path) -> None:
    """Write questions and answers of 20 to 160 words."""
    draw = random.Random(0)
    words = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
    rows = ([" ".join(draw.choices(words, k=draw.randint(10, 80))) for _ in range(2)] for _ in range(NUM_ROWS))
    file.write_text("".join(json.dumps({"prompt": one, "completion": two}) + "\n" for one, two in rows))


def read_compared(folder: Path) -> dict[str, Any]:
    """Return the planned and the actual figures in a job's manifest."""
    return json.loads((folder / "training_manifest.json").read_text(encoding="utf-8"))["planned_and_actual"]


def describe(name: str, memory_bytes: int, compared: dict[str, Any], lesson: Lesson) -> str:
    """Return a row of the table, with what was planned after the calibration."""
    planned, actual = compared["planned"], compared["actual"]
    step = planned["step_seconds"] * lesson.step_share
    rest = 3600 * planned["hours"] - planned["steps"] * planned["step_seconds"] - planned["start_seconds"]
    whole = planned["start_seconds"] * lesson.start_share + planned["steps"] * step + rest
    figures = (
        (planned["memory_bytes"] / 2**20, memory_bytes / 2**20, ".0f"),
        (step, actual["step_seconds"], ".2f"),
        (whole, 3600 * actual["hours"], ".1f"),
    )
    cells = (f"{plan:{form}}, took {took:{form}} | {plan / took - 1:+.1%}" for plan, took, form in figures)
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
