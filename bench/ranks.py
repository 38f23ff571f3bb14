# SPDX-License-Identifier: Apache-2.0
"""CPU ranks of one host beside each other: efficiency, the bytes that they send, the cost of agreement and checkpoints.

    .venv/bin/python bench/ranks.py MODEL [ROUNDS]

MODEL is a folder such as .demo/opt/ml/input/data/model after `make demo`: 1 and 2 ranks train it in turns. The bytes of
2 and 4 ranks are counted with a model of 40 million random weights, and stand beside what scaling.py computes. Each job
has a network namespace of its own (util-linux' unshare), whose loopback carries nothing else, and a thread a rank.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hooks import hook_worker, lay_hooks
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from llm_trainer.config.schema import Settings
from llm_trainer.model.memory.shape import read_shape
from llm_trainer.planning.traffic import count_traffic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.tiny_model import build_tokenizer

ROW_TOKENS, ROWS = 64, 64
STEPS, SAVE_STEPS = 12, 4
WARM_UP = 3  # steps that are not counted: memory and connections are made
HOOKS = hook_worker(
    "llm_trainer.export.manifest",  # imported when the classes below are
    """
import atexit, collections, json, os, time
import torch.distributed
from llm_trainer.training.resumable import ResumableMixin
from llm_trainer.training.stopping import StopConsensus

steps, seconds, calls = [], {"poll": [], "_save_checkpoint": [], "train_from": []}, collections.Counter()

def read_loopback():
    with open("/proc/net/dev") as lines:
        return next(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")

def timed(owner, name):
    method = getattr(owner, name)
    def call(*args, **kwargs):
        if name == "poll":
            saving = sum(seconds["_save_checkpoint"])
            steps.append([time.perf_counter() - saving, time.process_time(), read_loopback(), sum(calls.values())])
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[name].append(time.perf_counter() - started)
    setattr(owner, name, call)

def counted(owner, name):
    function = getattr(owner, name)
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)
    setattr(owner, name, call)

timed(StopConsensus, "poll")
timed(ResumableMixin, "_save_checkpoint"), timed(ResumableMixin, "train_from")
for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object"):
    counted(torch.distributed, name)
atexit.register(lambda: open(os.environ["MEASURED"], "w").write(json.dumps([steps, seconds, calls])))
""",
)
OWN_NETWORK = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@dataclass(frozen=True)
class Job:
    ranks: int
    distribution: str
    use_peft: bool = True
    pieces: int = 1

    @property
    def name(self) -> str:
        kind = "LoRA" if self.use_peft else "full"
        pieces = f", {self.pieces} batches a step" if self.pieces > 1 else ""
        return (
            f"{self.ranks} ranks, {self.distribution.upper()}, {kind}{pieces}" if self.ranks > 1 else f"1 rank, {kind}"
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "distribution": self.distribution,
            "use_peft": self.use_peft,
            "lora_r": 8,
            "lora_dropout": 0.0,
            "gradient_accumulation_steps": self.pieces,
        }


COUNTED = [
    *(Job(ranks, way, use_peft) for way in ("ddp", "fsdp") for use_peft in (True, False) for ranks in (2, 4)),
    Job(2, "fsdp", use_peft=False, pieces=2),
]
TIMED = [Job(1, "ddp"), Job(2, "ddp"), Job(2, "fsdp")]
RANDOM_MODEL = LlamaConfig(
    vocab_size=16_384, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=512, eos_token_id=2, pad_token_id=None,
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """Of rank 0, medians over the steps after the first ones."""

    step_seconds: float  # without checkpoints
    cpu_seconds: float
    step_bytes: float  # of all ranks, over the loopback, headers and all
    calls: float  # collectives that Python asked for; DDP's own come from C++
    agreement_seconds: float
    checkpoint_seconds: float
    agreement_share: float  # of the training time
    checkpoint_share: float
    checkpoint_bytes: int


def main(model: Path, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-ranks-model-") as name:
        compare_traffic(build_random_model(Path(name)))
    time_ranks(model.absolute(), rounds)


def compare_traffic(model: Path) -> None:
    print("| job | bytes a step, measured | computed | measured / computed | small collectives | checkpoint, bytes |")
    print("|---|---|---|---|---|---|")
    for job in COUNTED:
        found, computed = measure(job, model), compute_bytes(job, RANDOM_MODEL)
        print(
            f"| {job.name} | {found.step_bytes:,.0f} | {computed:,.0f} | {found.step_bytes / computed:.4f} "
            f"| {found.calls:.0f} | {found.checkpoint_bytes:,} |",
            flush=True,
        )


def compute_bytes(job: Job, config: LlamaConfig) -> int:
    """What all ranks send in a step. Gloo reduces and scatters by an all-reduce, in twice NCCL's bytes."""
    settings = Settings(**job.settings)
    shape = read_shape(config, settings.model, settings.adapter, torch.float32)
    sharded = job.distribution == "fsdp"
    traffic = count_traffic(shape, torch.float32, job.ranks if sharded else 1)
    if not sharded:
        return (job.ranks - 1) * traffic.reduced
    return (job.ranks - 1) * job.pieces * (traffic.gathered + traffic.gathered_again + 2 * traffic.reduced)


def time_ranks(model: Path, rounds: int) -> None:
    runs: dict[Job, list[Measurement]] = {job: [] for job in TIMED}
    for number in range(rounds):
        for job in TIMED[number % len(TIMED) :] + TIMED[: number % len(TIMED)]:
            runs[job].append(measure(job, model))
    print(f"medians of {rounds} rounds (least to most)")
    for job, own in runs.items():
        pairs = list(zip(runs[TIMED[0]], own, strict=True))
        print(f"{job.name}: {show([run.step_seconds for run in own])} s a step, efficiency", end=" ")
        print(show([one.step_seconds / many.step_seconds for one, many in pairs]), end="; CPU time of a rank's step ")
        print(show([many.cpu_seconds / one.cpu_seconds for one, many in pairs]), "of one rank's")
        for what in ("agreement", "checkpoint"):
            each = [1000 * getattr(run, f"{what}_seconds") for run in own]
            share = [100 * getattr(run, f"{what}_share") for run in own]
            print(f"  {what}: {show(each)} ms each, {show(share)} % of the training time", flush=True)


def build_random_model(folder: Path) -> Path:
    """On bytes as tokens; its embeddings are not the output layer's, as those of large models."""
    LlamaForCausalLM(RANDOM_MODEL).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def show(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def measure(job: Job, model: Path) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as name:
        folder = Path(name)
        tree, measured = folder / "opt-ml", folder / "measured.json"
        lay_out(tree, job, model)
        variables = {"SAGEMAKER_BASE_DIR": str(tree), **lay_hooks(folder, HOOKS), "MEASURED": str(measured)}
        command = [*OWN_NETWORK, sys.executable, "-m", "llm_trainer", "train"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise SystemExit(f"{job.name} failed:\n{run.stdout[-3000:]}")
        newest = tree / f"checkpoints/checkpoint-{STEPS}"
        checkpoint_bytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        return summarize(*json.loads(measured.read_text()), checkpoint_bytes)


def lay_out(tree: Path, job: Job, model: Path) -> None:
    """A job on rows of one length, so that all ranks have as much to do."""
    for folder in ("input/config", "input/data/train"):
        (tree / folder).mkdir(parents=True)
    (tree / "input/data/model").symlink_to(model)
    config = AutoConfig.from_pretrained(model)
    numbers = random.Random(0)
    rows = [[*numbers.choices(range(100, 250), k=ROW_TOKENS - 1), config.eos_token_id] for _ in range(ROWS)]
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (tree / "input/data/train/train.jsonl").write_text(lines)
    hyperparameters = {
        **job.settings,
        "nproc_per_node": job.ranks,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "sample_prompts": 0,
        "check_memory": False,
    }
    texts = {name: json.dumps(value).strip('"') for name, value in hyperparameters.items()}
    (tree / "input/config/hyperparameters.json").write_text(json.dumps(texts))


def summarize(
    steps: list[list[float]], seconds: dict[str, list[float]], calls: dict[str, int], checkpoint_bytes: int
) -> Measurement:
    counted = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(steps[WARM_UP:])]
    times, cpu, sent, asked = (statistics.median(column) for column in zip(*counted, strict=True))
    (training,) = seconds["train_from"]
    return Measurement(
        step_seconds=times,
        cpu_seconds=cpu,
        step_bytes=sent,
        calls=asked,
        agreement_seconds=statistics.median(seconds["poll"]),
        checkpoint_seconds=statistics.median(seconds["_save_checkpoint"]),
        agreement_share=sum(seconds["poll"]) / training,
        checkpoint_share=sum(seconds["_save_checkpoint"]) / training,
        checkpoint_bytes=checkpoint_bytes,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
