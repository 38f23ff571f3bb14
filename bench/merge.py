# SPDX-License-Identifier: Apache-2.0
"""How fast and in how much memory an adapter is merged, beside a copy of the same files and PEFT's merge_and_unload.

    .venv/bin/python bench/merge.py [ROUNDS] [FOLDER]

A Llama of a billion random weights, 2 GB of bfloat16 in 8 shards, with an adapter of rank 16 on all linear layers; each
way is a process of its own, in turns, on files that are in the page cache. FOLDER takes 6 GB.
"""

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHARD_SIZE = "270MB"
RANK = 16
WAYS = ("copy", "llm-trainer", "peft")
THREADS = 2


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        run_child("make", folder)
        shards = sorted((folder / "base").glob("*.safetensors"))
        sizes = [file.stat().st_size for file in shards]
        adapter = (folder / "adapter/adapter_model.safetensors").stat().st_size
        print(f"{len(shards)} shards, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e6:.0f} MB", flush=True)
        print(f"adapter {adapter / 1e6:.0f} MB", flush=True)
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            order = WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]
            for way in order:
                for file in shards:
                    file.read_bytes()  # into the page cache
                results[way].append(run_child(way, folder))
                shutil.rmtree(folder / way, ignore_errors=True)
            print({way: round(results[way][-1]["seconds"], 2) for way in WAYS}, flush=True)
        report(results, max(sizes), adapter)


def report(results: dict[str, list[dict[str, float]]], largest_bytes: int, adapter_bytes: int) -> None:
    limit = 1.3 * largest_bytes + adapter_bytes
    print(f"memory: 1.3 x the largest shard + the adapter = {limit / 1e6:.0f} MB")
    for way, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [run["seconds"] / copy["seconds"] for run, copy in zip(runs, results["copy"], strict=True)]
        peak = max(run["peak_bytes"] for run in runs)
        print(
            f"{way:12} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{statistics.median(ratios):5.2f} x the copy ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"peak {peak / 1e6:5.0f} MB, {(peak - adapter_bytes) / largest_bytes:5.2f} x the largest shard + adapter"
        )


def run_child(way: str, folder: Path) -> dict[str, float]:
    """What the last line says that this script prints as a child."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", way, str(folder)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{way}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds, and the highest resident set above that after the imports."""
    if way == "make":
        make(folder)
        return {}
    work = {"copy": prepare_copy, "llm-trainer": prepare_ours, "peft": prepare_peft}[way](folder)
    import torch

    from llm_trainer.model.memory.peak import Peak

    gc.collect()
    peak = Peak(torch.device("cpu"))
    started = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak.read_bytes()}


def prepare_copy(folder: Path) -> Any:
    def copy() -> None:
        (folder / "copy").mkdir()
        for file in sorted((folder / "base").iterdir()):
            shutil.copyfile(file, folder / "copy" / file.name)

    return copy


def prepare_ours(folder: Path) -> Any:
    from transformers import AutoConfig, LlamaForCausalLM  # noqa: F401

    from llm_trainer.merge.merge import write_merged_model
    from llm_trainer.merge.plan import MergeRequest

    config = AutoConfig.from_pretrained(folder / "base")
    request = MergeRequest(folder / "base", folder / "adapter", config)
    return lambda: write_merged_model(request, folder / "llm-trainer")


def prepare_peft(folder: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    def merge() -> None:
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, folder / "adapter")
        model.merge_and_unload().save_pretrained(folder / "peft", max_shard_size=SHARD_SIZE)

    return merge


def make(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SHAPE)).to(torch.bfloat16)
    base.to_empty(device="cpu")
    numbers = torch.randn(1_000_003, dtype=torch.bfloat16) / 50  # again and again: a billion would take minutes
    for parameter in base.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])
    base.save_pretrained(folder / "base", max_shard_size=SHARD_SIZE)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float().normal_(0, 0.02)
    model.save_pretrained(folder / "adapter")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
