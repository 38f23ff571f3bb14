# SPDX-License-Identifier: Apache-2.0
"""training_manifest.json: what made this model. Versions, settings, data, metrics and where the time went."""

import os
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from llm_trainer import __version__
from llm_trainer.common.ranks import world_size
from llm_trainer.common.versions import read_versions
from llm_trainer.data.report import DataReport
from llm_trainer.data.streaming import AUDITED_ROWS
from llm_trainer.journal.manifest import Manifest
from llm_trainer.journal.records import SCHEMA_VERSION
from llm_trainer.model.lora import count_parameters, count_targets
from llm_trainer.training.packing import Packing
from llm_trainer.training.resumable import ResumableMixin


@dataclass(frozen=True)
class Origin:
    """The weights that a run began with."""

    base_digest: str | None  # of some bytes of the base's weights, where its files are in a folder
    lineage: list[dict[str, Any]]  # the adapters that the training went on from, the newest first
    teacher: str | None = None  # the same of a teacher, and how it was rounded


@dataclass(frozen=True)
class TrainedRun:
    """Facts about a run for the manifest, besides those that its trainer knows."""

    model: str  # as the job names it
    origin: Origin
    settings: dict[str, Any]  # without secrets
    streaming: bool
    reports: dict[str, DataReport]  # by split
    packing: Packing
    memory: dict[str, Any]  # the estimate beside the measured peak
    totals: dict[str, float]  # Transformers' metrics of the whole run
    phase_seconds: dict[str, float]  # the timeline's own, so that phases still to come are added


def begin_manifest(settings: dict[str, Any], reports: dict[str, DataReport]) -> Manifest:
    """Return the manifest's fields that are known before the training. The settings are without secrets."""
    return {
        "schema_version": SCHEMA_VERSION,
        "llm_trainer": __version__,
        "training_job_name": os.environ.get("TRAINING_JOB_NAME"),
        "settings": settings,
        "data": {name: report.summary() for name, report in reports.items()},
        "versions": read_versions(),
    }


def build_manifest(trainer: ResumableMixin, run: TrainedRun) -> Manifest:
    """Return the manifest, ready for JSON and without secrets."""
    return {
        **begin_manifest(run.settings, run.reports),
        "model": run.model,
        "base_digest": run.origin.base_digest,
        "lineage": run.origin.lineage,
        **({"teacher_digest": run.origin.teacher} if run.origin.teacher else {}),
        "training_arguments": {
            name: getattr(trainer.args, name)
            for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed", "bf16", "fp16")
        },
        **describe_weights(trainer.model),
        "audited_rows_of_each_train_source": AUDITED_ROWS if run.streaming else "all",
        "packing": run.packing.describe(),
        "memory": run.memory,
        "metrics": {**run.totals, **last_metrics(trainer.state.log_history)},
        "num_steps": trainer.state.global_step,
        "total_steps": trainer.state.max_steps,
        "stopped": trainer.stopped,
        "world_size": world_size(),
        "planned_and_actual": {},  # stays so where the job could not be planned
        "phase_seconds": run.phase_seconds,
    }


def describe_weights(model: PreTrainedModel | PeftModel) -> Manifest:
    """Return the manifest's fields on how many weights are trained, and on what an adapter sits."""
    trainable, total = count_parameters(model)
    described: Manifest = {"trainable_parameters": trainable, "parameters": total}
    if isinstance(model, PeftModel):
        described["adapter"] = {
            "targets": count_targets(model),
            "lora_dropout": model.active_peft_config.lora_dropout,
        }
    return described


def last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the newest value of every metric that training and evaluation logged."""
    newest: dict[str, float] = {}
    for entry in history:
        newest |= {key: value for key, value in entry.items() if key == "loss" or key.startswith("eval_")}
    return newest
