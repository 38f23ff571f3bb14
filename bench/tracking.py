# SPDX-License-Identifier: Apache-2.0
"""What measuring and tracking cost a training: a sample of eight (fake) GPUs; whole jobs with all of it and without.

    .venv/bin/python bench/tracking.py [PAIRS] [STEPS]

The jobs train a Llama of 3.5 million weights on the CPU: with samples of eight GPUs and of the host, the journal, and
MLflow in a SQLite file; and with none of these. They alternate, and each pair's two times a step are compared, since a
machine's speed drifts. The fake NVML's calls cost next to nothing: how many there are says what a real one adds.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from hooks import lay_hooks

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support.sagemaker_tree import HYPERPARAMETERS, ROWS, SageMakerTree  # noqa: E402

SAMPLE = """
import json, sys, tempfile, time
from pathlib import Path

import pynvml
from llm_trainer.host.nvidia_driver import open_nvml
from llm_trainer.host.gpu_metrics import Gpus
from llm_trainer.host.host_metrics import HostReader
from llm_trainer.journal.journal import Journal

find, calls, repeats = pynvml._nvmlGetFunctionPointer, [], 200

def count(name):
    calls.append(name)
    return find(name)

def cost(what, work):
    calls.clear()
    started = time.process_time()
    for _ in range(repeats):
        work()
    milliseconds = 1000 * (time.process_time() - started) / repeats
    print(f"{what}: {milliseconds:.2f} ms of CPU time, {len(calls) // repeats} calls of NVML")

pynvml._nvmlGetFunctionPointer = count
with open_nvml(), tempfile.TemporaryDirectory() as folder:
    journal = Journal(Path(folder) / "metrics.jsonl")
    gpus, host = Gpus("algo-1", print), HostReader({"checkpoints": Path(folder), "temp": Path("/tmp")})
    gpus.read()
    cost("A sample of 8 GPUs, at most every 5 s", lambda: journal.write("system", host="algo-1", gpus=gpus.read()))
    cost("A sample of the host, as often", lambda: journal.write("system", host="algo-1", values=host.read()))
    cost("A look for XIDs, every second", gpus.collect_xids)
"""
OFF = """
from llm_trainer.host import system_metrics
from llm_trainer.journal import journal

journal.Journal.write = lambda *arguments, **fields: None
system_metrics.SystemMetrics.__enter__ = lambda self: self
system_metrics.SystemMetrics.__exit__ = lambda self, *exception: None
"""
MODEL = """
import sys
from support.tiny_model import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

tokenizer = build_tokenizer()
shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def main(pairs: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        library = root / "libnvidia-ml.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, TESTS / "support/fake_nvml/nvml.c"], check=True)
        fake_gpus = {"LD_LIBRARY_PATH": folder, "FAKE_NVML_GPUS": "8"}
        subprocess.run([sys.executable, "-c", SAMPLE], env={**os.environ, **fake_gpus}, check=True)
        model = root / "model"
        subprocess.run([sys.executable, "-c", MODEL, model], env={**os.environ, "PYTHONPATH": str(TESTS)}, check=True)
        variables = {"on": fake_gpus, "off": fake_gpus | lay_hooks(root / "off", OFF)}
        job = {"model_id": str(model), "max_steps": str(steps), "use_cpu": "true"}
        slowdowns = []
        for number in range(pairs):
            mlflow = {"report_to": "mlflow", "mlflow_uri": f"sqlite:///{root}/mlflow-{number}.db"}
            jobs = {"on": job | mlflow, "off": job | {"report_to": "none"}}
            seconds, beside = {}, {}
            for kind in ("on", "off") if number % 2 else ("off", "on"):
                tree = SageMakerTree(root / f"{kind}-{number}", variables[kind])
                seconds[kind], beside[kind] = measure(tree, jobs[kind])
            slowdowns.append(seconds["on"] / seconds["off"] - 1)
            print(
                f"{1000 * seconds['off']:.1f} ms a step without, {1000 * seconds['on']:.1f} ms with: "
                f"{slowdowns[-1]:+.2%}; CPU time of the launcher and what it started for tracking: "
                f"{beside['off']:.2%} of a core without, {beside['on']:.2%} with",
                flush=True,
            )
        print(f"median of {pairs} pairs: {statistics.median(slowdowns):+.2%}")


def measure(tree: SageMakerTree, hyperparameters: dict[str, str]) -> tuple[float, float]:
    """Seconds a step; and CPU seconds a second, while it trained, of the launcher and what it started for tracking."""
    tree.write("input/data/train/train.jsonl", "".join(f"{line}\n" for line in map(json.dumps, ROWS)))
    tree.write_job({**HYPERPARAMETERS, **hyperparameters, "logging_steps": "10", "save_strategy": "no"}, ("train",))
    job = tree.start()
    steps: list[tuple[float, int]] = []
    spent: list[tuple[float, float]] = []
    threading.Thread(target=watch, args=[job.process.pid, spent], daemon=True).start()
    assert job.process.stdout is not None
    for line in job.process.stdout:
        job.log += line
        if found := re.search(r"\bstep=(\d+)", line):
            steps.append((time.monotonic(), int(found[1])))
    assert job.process.wait() == 0, job.log
    (began, first), (ended, last) = steps[0], steps[-1]
    inside = [pair for pair in spent if began <= pair[0] <= ended]
    (began_at, before), (ended_at, after) = inside[0], inside[-1]
    return (ended - began) / (last - first), (after - before) / (ended_at - began_at)


def watch(launcher: int, spent: list[tuple[float, float]]) -> None:
    """Every second the CPU seconds so far of the launcher and its children, but the worker's, until its end."""
    while True:
        try:
            root = psutil.Process(launcher)
            processes = [
                child for child in root.children() if "llm_trainer.launcher.single_worker" not in child.cmdline()
            ]
            times = [process.cpu_times() for process in (root, *processes)]
            spent.append((time.monotonic(), sum(each.user + each.system for each in times)))
        except psutil.Error:
            return
        time.sleep(1)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(*numbers, *(5, 300)[len(numbers) :])
