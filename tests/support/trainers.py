# SPDX-License-Identifier: Apache-2.0
"""Trainers for tests that need one without a job."""

from pathlib import Path
from typing import Any

import torch

from llm_trainer.config.schema import Settings
from llm_trainer.journal.journal import Journal
from llm_trainer.training.methods import choose_method
from llm_trainer.training.resumable import ResumableMixin, RunContext
from llm_trainer.training.stopping import StopConsensus
from llm_trainer.training.trainer_config import ArgumentSources, TrainerParts, build_arguments, build_trainer


def build_run_context(**values: Any) -> RunContext:
    """Return the context of a run of one rank, without a journal."""
    return RunContext(**{"consensus": StopConsensus(1800), "identity": {}, "journal": Journal(None), **values})


def collect_sources(settings: Settings, checkpoint_dir: Path, has_validation: bool = False) -> ArgumentSources:
    """Return what a job with these settings makes its training arguments of."""
    return ArgumentSources(settings.given, settings.training, settings.adapter.use_peft, has_validation, checkpoint_dir)


def build_full_trainer(
    model: Any,
    tokenizer: Any,
    rows: Any,
    collator: Any,
    checkpoint_dir: Path,
    validation: Any = None,
    memory_plan: Any = None,
    **settings: Any,
) -> ResumableMixin:
    """Return a trainer of all weights on the CPU, with these settings besides the default ones."""
    sources = collect_sources(Settings(use_peft=False, **settings), checkpoint_dir, validation is not None)
    arguments = build_arguments(choose_method(), sources, torch.device("cpu"), torch.float32, memory_plan)
    splits = {"train": rows} if validation is None else {"train": rows, "validation": validation}
    parts = TrainerParts(model, tokenizer, arguments, splits, collator, lora=None)
    return build_trainer(choose_method(), parts, build_run_context(), patience=None)
