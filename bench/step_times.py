# SPDX-License-Identifier: Apache-2.0
"""The planned seconds of a step beside those that it took: jobs of this project on one H200, and published ones.

    .venv/bin/python bench/step_times.py

It prints what others have published beside this plan of the same job, and writes the plan of this project's own jobs
into bench/gpu-h200.json. Then bench/gpu_tables.py makes the table of bench/RESULTS.md anew.
"""

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.liger import KERNELS
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, ParallelismPlan, Target
from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.step_time import StepTime, time_step

FIGURES = Path(__file__).resolve().with_name("gpu-h200.json")
ROW_TOKENS, LONG_ROW_TOKENS = 167, 4086  # of tests/gpu/whole_jobs.py
TRAINED = {"lora_r": 16, "lora_dropout": 0.0}
SHORT = {**TRAINED, "max_length": 512, "per_device_train_batch_size": 24}
PACKED = {**TRAINED, "packing": True, "max_length": 4096, "per_device_train_batch_size": 2}
FULL = {"use_peft": False}


def build_config(layers: int, width: int, mlp: int, heads: int, shared: int, vocabulary: int) -> LlamaConfig:
    """A Llama with tied embeddings. A GPT's MLP has two matrices, 4 times as wide as the model, as 8/3 of three."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, tie_word_embeddings=True,
    )  # fmt: skip


CONFIGS = {
    "1B": build_config(16, 2048, 8192, 32, 8, 128_256),
    "8B": build_config(32, 4096, 14_336, 32, 8, 128_256),
    "MPT 1B": build_config(24, 2048, 5461, 16, 16, 50_368),
    "MPT 3B": build_config(32, 2560, 6827, 20, 20, 50_368),
    "MPT 7B": build_config(32, 4096, 10_923, 32, 32, 50_368),
    "MPT 13B": build_config(40, 5120, 13_653, 40, 40, 50_368),
    "Qwen 1.8B": build_config(24, 2048, 5504, 16, 16, 151_936),
    "Qwen 7B": build_config(32, 4096, 11_008, 32, 32, 151_936),
}


@dataclass(frozen=True)
class Case:
    """A job whose steps were timed, on as many GPUs of one instance type."""

    model: str
    settings: dict[str, Any]
    row_tokens: int
    recomputes: bool = False
    host: str = "ml.p5en.48xlarge"
    gpus: int = 1
    kernels: frozenset[str] = field(default=frozenset(KERNELS))  # Liger's


JOBS = {  # by size and name, as bench/gpu-h200.json has them
    "8B packed-4k": Case("8B", PACKED, ROW_TOKENS),
    "8B fp8": Case("8B", {**PACKED, "base_compute": "fp8"}, ROW_TOKENS),
    "8B qlora-4k": Case("8B", {**PACKED, "load_in_4bit": True}, ROW_TOKENS),
    "8B long-rows": Case("8B", PACKED, LONG_ROW_TOKENS),
    "8B recomputed-4k": Case("8B", PACKED, ROW_TOKENS, recomputes=True),
    "1B lora": Case("1B", SHORT, ROW_TOKENS),
    "1B full": Case("1B", {**FULL, "max_length": 512, "per_device_train_batch_size": 24}, ROW_TOKENS),
    "1B packed-4k": Case("1B", PACKED, ROW_TOKENS),
    "1B long-rows": Case("1B", PACKED, LONG_ROW_TOKENS),
    "1B qlora-4k": Case("1B", {**PACKED, "load_in_4bit": True}, ROW_TOKENS),
}
H100, A100_80, A100_40 = "ml.p5.48xlarge", "ml.p4de.24xlarge", "ml.p4d.24xlarge"
# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: all weights, FSDP. Tokens of a row, rows of a batch,
# batches of a step, GPUs, whether layers are recomputed, tokens a second and GPU.
FOUNDRY = (
    (H100, "MPT 1B", 512, 56, 4, 8, False, 52_275),
    (H100, "MPT 1B", 2048, 14, 1, 8, False, 45_455),
    (H100, "MPT 3B", 512, 40, 6, 8, False, 27_965),
    (H100, "MPT 3B", 2048, 10, 3, 16, False, 24_142),
    (H100, "MPT 7B", 2048, 6, 1, 8, False, 10_643),
    (H100, "MPT 7B", 4096, 16, 2, 8, True, 8611),
    (H100, "MPT 7B", 32_768, 2, 2, 8, True, 3318),
    (H100, "MPT 13B", 2048, 2, 1, 16, False, 4767),
    (A100_80, "MPT 1B", 2048, 14, 4, 8, False, 20_513),
    (A100_80, "MPT 1B", 8192, 3, 4, 8, False, 13_814),
    (A100_80, "MPT 3B", 512, 40, 6, 8, False, 12_127),
    (A100_80, "MPT 7B", 2048, 6, 2, 8, False, 4641),
    (A100_80, "MPT 7B", 4096, 16, 2, 8, True, 3684),
    (A100_80, "MPT 7B", 32_768, 2, 2, 8, True, 1672),
    (A100_80, "MPT 13B", 2048, 2, 3, 8, False, 2262),
    (A100_40, "MPT 3B", 4096, 2, 8, 8, False, 8777),
    (A100_40, "MPT 7B", 2048, 12, 4, 8, True, 3679),
)
# QwenLM/Qwen, README.md: LoRA and QLoRA on one A100 80GB, recomputed, a row a batch, 8 batches a step. Seconds of it.
QWEN = (
    ("Qwen 1.8B", 256, False, 1.0),
    ("Qwen 1.8B", 2048, False, 1.7),
    ("Qwen 7B", 256, False, 1.2),
    ("Qwen 7B", 1024, False, 2.8),
    ("Qwen 7B", 4096, False, 10.1),
    ("Qwen 7B", 4096, True, 11.6),
)


@functools.cache
def build_scenario(model: str, settings: str, host: str, gpus: int, kernels: frozenset[str]) -> MemoryScenario:
    """The job's scenario. Those of the same job share the model's shape, and so what is traced of it."""
    every = Settings(**json.loads(settings))
    sections = MemorySettings(every.model, every.adapter, every.data, every.training, every.parallelism)
    gpu = read_instances().types[host].gpu
    target = Target(Device(torch.device("cuda"), gpu.name, gpu.capability), gpus, gpu.memory_bytes)
    return MemoryScenario(CONFIGS[model], sections, ROW_TOKENS, target, "flash_attention_2", kernels)


def plan_step(case: Case) -> StepTime:
    """Return what the plan tells of a step."""
    scenario = build_scenario(case.model, json.dumps(case.settings), case.host, case.gpus, case.kernels)
    scenario = replace(scenario, longest_row=case.row_tokens, known_shape=scenario.shape)
    plan = ParallelismPlan(sharded=case.gpus > 1, recompute_activations=case.recomputes, offload_activations=False)
    step = time_step(read_instances().types[case.host], scenario, plan, case.gpus, case.row_tokens)
    assert step is not None
    return step


def list_published() -> list[tuple[str, Case, float]]:
    """List published jobs: what they are, the job, and the seconds that their step took."""
    found = []
    for host, model, tokens, rows, pieces, gpus, recomputes, speed in FOUNDRY:
        batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": pieces}
        case = Case(model, {**FULL, **batch, "max_length": tokens}, tokens, recomputes, host, gpus)
        name = f"{model}, all weights, rows of {tokens:,}{', recomputed' * recomputes}"
        found.append((name, case, rows * pieces * tokens / speed))
    for model, tokens, in_4bit, seconds in QWEN:
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_length": tokens}
        settings = {"lora_r": 64, "lora_dropout": 0.05, **batch, "load_in_4bit": in_4bit}
        case = Case(model, settings, tokens, True, A100_80, kernels=frozenset())
        found.append((f"{model}, {'Q' * in_4bit}LoRA, rows of {tokens:,}", case, seconds))
    return found


def main() -> None:
    """Print the published jobs, and keep the plans of this project's own."""
    print("| published job | on | planned, s | took, s | of the plan | its range |", "|---|" + "---|" * 5, sep="\n")
    for name, case, seconds in list_published():
        step = plan_step(case)
        low, high = (limit / step.seconds for limit in step.range_seconds)
        on = f"{case.gpus} x {read_instances().types[case.host].gpu.name}"
        took = f"{seconds:.2f} | {seconds / step.seconds:.2f}"
        print(f"| {name} | {on} | {step.seconds:.2f} | {took} | {low:.2f} to {high:.2f} |", flush=True)
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    for name, case in JOBS.items():
        figures["steps"][name]["planned_ms"] = round(1000 * plan_step(case).seconds)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
