# SPDX-License-Identifier: Apache-2.0
"""Whole jobs of `llm-trainer train` on a Llama of random weights, each in a tree as SageMaker lays it out."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import gpu
from support.sagemaker_tree import SageMakerTree
from support.tiny_model import build_tokenizer

STEERED = Path(__file__).with_name("steered.py")
NUM_ROWS, NUM_VALIDATION_ROWS, NUM_STEPS = 600, 16, 24
NUM_CHARACTERS = 134  # of the longest answer: three rows fill a packed sequence
NUM_LONG_CHARACTERS = 4050  # of the longest answer of the long rows: one fills a sequence of 4096 tokens
COMMON = {
    "lora_r": "16",
    "lora_dropout": "0",  # jobs are compared with each other
    "learning_rate": "1e-3",
    "max_length": "512",
    "max_steps": str(NUM_STEPS),
    "per_device_train_batch_size": "24",
    "logging_steps": "1",
    "sample_prompts": "0",
    "use_checkpoints": "false",
}
SAVES = {"use_checkpoints": "true", "save_steps": "10"}
FULL = {"use_peft": "false", "lora_r": "", "lora_dropout": "", "learning_rate": "1e-4"}  # "" leaves a setting out
FSDP = {"distribution": "fsdp"}


@dataclass(frozen=True)
class WholeJob:
    """A job, and how it differs from a LoRA job of defaults."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    ways: str = ""  # of steered.py
    stop_at: int = 0  # the step at which SIGTERM comes; another start then goes on
    like: str = ""  # the job whose losses it has to have
    is_coarse: bool = False  # it rounds more than bfloat16 does
    rows: str = "train"  # the folder of its rows
    needs_gpu: bool = False


PACKED = {"packing": "true", "per_device_train_batch_size": "8"}
PACKED_4K = {**PACKED, "max_length": "4096", "per_device_train_batch_size": "2"}
SDPA = {"attn_implementation": "sdpa"}
# Those that tell most first: the time may not be enough for all.
JOBS = (
    WholeJob("lora"),
    WholeJob("torch-flash", {"attn_implementation": "flash_attention_torch"}, like="lora", needs_gpu=True),
    WholeJob("fsdp", {**SAVES, **FSDP}, ways="fsdp", like="lora"),
    WholeJob("qlora-merge", {"load_in_4bit": "true", "merge_weights": "true"}),
    WholeJob("fsdp-qlora", {**FSDP, "load_in_4bit": "true"}, ways="fsdp", like="qlora-merge"),
    WholeJob("full", FULL),
    WholeJob("packed", PACKED),
    WholeJob("packed-4k", PACKED_4K),
    WholeJob("fp8", {**PACKED_4K, "base_compute": "fp8"}, like="packed-4k", is_coarse=True, needs_gpu=True),
    WholeJob("long-rows", PACKED_4K, rows="long"),
    WholeJob("qlora-4k", {**PACKED_4K, "load_in_4bit": "true"}),
    WholeJob("recomputed-4k", {**PACKED_4K, "gradient_checkpointing": "true"}, like="packed-4k"),
    WholeJob("packed-sdpa", {**PACKED, **SDPA}, like="packed"),
    WholeJob("lora-sdpa", {**SDPA, "use_liger_kernel": "false"}, like="lora"),
    WholeJob("fsdp-full", {**FULL, **FSDP}, ways="fsdp", like="full"),
    WholeJob("offloaded", {"activation_offloading": "true"}, like="lora", needs_gpu=True),
    WholeJob("recomputed", {"gradient_checkpointing": "true"}, like="lora"),
    WholeJob("float16", {"torch_dtype": "float16"}, like="lora", needs_gpu=True),
    WholeJob("8-bit", {"load_in_8bit": "true"}),
    WholeJob("flex", {"attn_implementation": "flex_attention"}, like="lora", needs_gpu=True),
    WholeJob("resumed", SAVES, stop_at=8, like="lora"),
    WholeJob("torchrun", SAVES, ways="torchrun", like="lora"),
    WholeJob("padded", {"packing": "false"}),
    WholeJob("answers", {"sample_prompts": "2"}, ways="cpu-proof", like="lora"),
    WholeJob("exact", {"full_determinism": "true"}, like="lora"),
    WholeJob("exact-resumed", {**SAVES, "full_determinism": "true"}, stop_at=8, like="exact"),
    WholeJob("kept", {"gradient_checkpointing": "false"}, like="lora"),
)


def build_base(folder: Path, size: str) -> None:
    """Write bench/gpu.py's model of this size, in bfloat16, with a tokenizer of bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = copy.deepcopy(gpu.SIZES[size])
    config.tie_word_embeddings = True  # as 1B has it
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = build_tokenizer()
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_rows(folder: Path) -> None:
    """Write chats that a model can learn, of nearly the same length, as the estimate counts on the longest row."""
    validation = range(NUM_ROWS, NUM_ROWS + NUM_VALIDATION_ROWS)
    kinds = {"train": (range(NUM_ROWS), NUM_CHARACTERS), "validation": (validation, NUM_CHARACTERS)}
    kinds["long"] = range(NUM_ROWS), NUM_LONG_CHARACTERS
    for name, (firsts, length) in kinds.items():
        lines = []
        for first in firsts:
            answer = " ".join(map(str, range(first, first + length)))[: length - first % 7]
            turns = {"user": f"Count from {first:03}.", "assistant": answer}
            lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns.items()]}))
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")


def lay_tree(job: WholeJob, work: Path) -> SageMakerTree:
    """Return the job's tree, with links to the base and the rows below `work`."""
    tree = SageMakerTree(work / job.name)
    channels = ("model", "train", *(["validation"] if job.settings.get("sample_prompts") else []))
    values = {**COMMON, **job.settings}
    tree.write_job({name: value for name, value in values.items() if value}, channels)
    data = tree.base_dir / "input/data"
    data.mkdir(parents=True)
    names = {"train": job.rows}
    for channel in channels:
        (data / channel).symlink_to(
            work / "base" if channel == "model" else work / "rows" / names.get(channel, channel)
        )
    return tree


def start(job: WholeJob, tree: SageMakerTree, log: Path) -> "subprocess.Popen[bytes]":
    """Start the job as the container would, its log appended to a file."""
    program = [str(STEERED), job.ways] if job.ways else ["-m", "llm_trainer"]
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, *program, "train"],
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def end(process: "subprocess.Popen[bytes]", deadline: float) -> int | str:
    """Return the exit code, or the words that the process had to be killed at the deadline, by time.monotonic()."""
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()  # its workers die with it
        process.wait()
        return "killed: its time was up"


def run_job(job: WholeJob, work: Path, limit: float) -> dict[str, Any]:
    """Run the job to its end, for `limit` seconds at most. Return what there is to judge."""
    tree, log, started = lay_tree(job, work), work / f"{job.name}.log", time.monotonic()
    deadline = started + limit
    process, earlier = start(job, tree, log), {}
    if job.stop_at:
        wait_for_step(job.stop_at, process, log, deadline)
        process.send_signal(signal.SIGTERM)
        earlier = {"stop": end(process, deadline)} | read_journal(tree)
        process = start(job, tree, log)
    exit_code = end(process, deadline)
    result = {"exit": exit_code, "seconds": round(time.monotonic() - started, 1), **read_journal(tree)}
    if job.stop_at:
        result["stop"] = {"exit": earlier["stop"], "losses": earlier["losses"]}
        result["losses"] = {**earlier["losses"], **result["losses"]}
    return result | read_log(log) | {"folder": str(tree.base_dir)}


def wait_for_step(step: int, process: "subprocess.Popen[bytes]", log: Path, deadline: float) -> None:
    """Return when the log shows the step, or the process has ended, or the time is up."""
    while process.poll() is None and time.monotonic() < deadline:
        if f"; step={step};" in log.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.02)


def read_journal(tree: SageMakerTree) -> dict[str, Any]:
    """Return losses by step, speed, memory, proof, and the GPU's series out of the job's journal."""
    file = tree.base_dir / "output/data/metrics.jsonl"
    records = tree.read_journal() if file.exists() else []
    steps = [record for record in records if record["kind"] == "metrics" and "train_loss" in record["values"]]
    manifest: dict[str, Any] = next((record for record in reversed(records) if record["kind"] == "manifest"), {})
    late = [record["values"] for record in steps[len(steps) // 2 :]]
    return {
        "losses": {str(record["step"]): record["values"]["train_loss"] for record in steps},
        **{name: middle(values.get(name) for values in late) for name in ("tokens_per_second", "mfu")},
        "memory": manifest.get("memory"),
        "export": manifest.get("export"),
        "phases": manifest.get("phase_seconds"),
        "plan": manifest.get("planned_and_actual"),
        "gpu_series": collect_series(records),
        "answers": sum(record["kind"] == "generation" for record in records),
    }


def middle(values: Any) -> float | None:
    """Return the median of the values that are there."""
    there = sorted(value for value in values if value is not None)
    return there[len(there) // 2] if there else None


def collect_series(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the values of each metric of the first GPU, in their order."""
    series: dict[str, list[float]] = {}
    for record in records:
        for name, column in (record.get("gpus") or {}).items():
            series.setdefault(name, []).append(column[0])
    return series


def read_log(log: Path) -> dict[str, Any]:
    """Return the lines that tell what was chosen, and those that warn or tell of an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    chosen = ("Precision:", "float8:", "Attention:", "Liger", "Memory:", "Packing:", "Resuming", "Stopped")
    return {
        "chosen": [line for line in lines if line.startswith(chosen)],
        "warnings": [line for line in lines if re.search(r"warn|error|traceback", line, re.IGNORECASE)],
        "tail": lines[-5:],
    }
