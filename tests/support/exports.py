# SPDX-License-Identifier: Apache-2.0
"""Results of trainings that never ran, to be exported without a job: a tiny model with random weights or adapter."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from llm_trainer.config.schema import Settings
from llm_trainer.export.logits_check import compute_logits
from llm_trainer.export.result import ExportPlaces, ExportSettings, TrainingResult
from llm_trainer.export.stop_watch import StopWatch
from llm_trainer.journal.manifest import Manifest
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.device import find_device
from llm_trainer.model.loading import load_model
from llm_trainer.model.plan import PlanSettings, plan_model
from llm_trainer.model.precision import choose_precision

ROWS = [[3, 4, 5, 6, 7], [9, 8, 7], [5, 5]]


def build_result(base: Path, tree: Path, **given: Any) -> TrainingResult:
    """Return the result of a job with these settings on the CPU, whose folders are below `tree`."""
    settings = Settings(use_cpu=True, torch_dtype="float32", lora_r=4, **given)
    device = find_device(use_cpu=True)
    precision = choose_precision(settings.model, settings.adapter, device)
    sections = PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output)
    plan = plan_model(str(base), sections, device, precision)
    model = load_model(plan.folder, settings.model, plan.load_options, device.torch)
    torch.manual_seed(1)
    if plan.lora is not None:
        model = get_peft_model(model, plan.lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if plan.lora is None or "lora_" in name:
                weight.normal_(0, 0.1)
    for name in ("model", "output/data", "scratch"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    return TrainingResult(
        settings=ExportSettings(settings.model, settings.adapter, settings.data, settings.tracking, settings.output),
        places=ExportPlaces(tree / "model", tree / "output", tree / "scratch"),
        base_name=str(base),
        plan=plan,
        trainer=build_idle_trainer(model),
        weights=None,
        rows=ROWS,
        logits=compute_logits(model, ROWS, device.torch),
        unproven=None,
        tokenizer=AutoTokenizer.from_pretrained(base),
        timeline=Timeline(time.time()),
        watch=StopWatch(tree / "scratch/stop", is_stopped=False),
    )


def build_idle_trainer(model: torch.nn.Module) -> Any:
    """Return what the export needs of a trainer whose training is over."""
    return SimpleNamespace(
        model=model,
        stopped=False,
        args=SimpleNamespace(bf16=False, fp16=False),
        run=SimpleNamespace(adapter_start=None),
        accelerator=SimpleNamespace(free_memory=lambda: None),
    )


def build_manifest() -> Manifest:
    """Return what a training tells about itself, as far as the model card reads it."""
    return {
        "llm_trainer": "0.1.0",
        "training_job_name": "sums",
        "settings": {"lora_r": 4},
        "trainable_parameters": 10,
        "parameters": 1000,
        "data": {},
        "metrics": {"eval_loss": 0.5},
        "num_steps": 4,
        "total_steps": 4,
        "stopped": False,
        "world_size": 1,
        "versions": {"python": "3.11.7"},
    }
