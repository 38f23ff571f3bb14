# SPDX-License-Identifier: Apache-2.0
"""What the agreement to stop and the checkpoints cost a run, in percent of its training time.

    .venv/bin/python bench/overhead.py TREE [RANKS]

runs the job of an /opt/ml tree, such as .demo/opt/ml after `make demo`, in a copy, with timers round both. One run, so
that the ratio does not depend on how busy the machine is.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TIMERS = """
import atexit, json, os, sys, time

if "LOCAL_RANK" in os.environ:
    seconds, calls = {}, {}

    def timed(owner, name):
        method = getattr(owner, name)
        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - started
                calls[name] = calls.get(name, 0) + 1
        setattr(owner, name, call)

    class Finder:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == "llm_trainer.manifest":  # imported when the classes below are
                sys.meta_path.remove(self)
                from llm_trainer.resumable_trainer import ResumableTrainer
                from llm_trainer.stopping import Agreement
                timed(Agreement, "reach"), timed(ResumableTrainer, "_save_checkpoint"), timed(ResumableTrainer, "train")
            return None

    sys.meta_path.insert(0, Finder())
    if os.environ["RANK"] == "0":
        atexit.register(lambda: open(os.environ["TIMES"], "w").write(json.dumps([seconds, calls])))
"""


def main(source: Path, ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "opt-ml"
        shutil.copytree(source / "input", tree / "input")
        (Path(folder) / "sitecustomize.py").write_text(TIMERS)
        times = Path(folder) / "times.json"
        variables = {"SAGEMAKER_BASE_DIR": str(tree), "PYTHONPATH": folder, "TIMES": str(times)}
        command = [sys.executable, "-m", "llm_trainer", "train", "--nproc_per_node", str(ranks)]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
        seconds, calls = json.loads(times.read_text())
        manifest = json.loads((tree / "model/training_manifest.json").read_text())
    total, steps = seconds["train"], manifest["num_steps"]
    print(f"{ranks} ranks, {steps} steps, {total / steps:.3f} s a step, evaluations and checkpoints included")
    for name, meaning in (("reach", "agreement to stop"), ("_save_checkpoint", "checkpoints")):
        print(
            f"{meaning}: {calls[name]} times, {1000 * seconds[name] / calls[name]:.2f} ms each, "
            f"{seconds[name] / total:.3%} of the training time"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
