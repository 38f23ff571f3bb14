# SPDX-License-Identifier: Apache-2.0
"""Trainers for tests that need one without a job, and ranks that train with them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llm_trainer.config.schema import Settings
from llm_trainer.journal.journal import Journal
from llm_trainer.training.methods import choose_method
from llm_trainer.training.resumable import ResumableMixin, RunContext
from llm_trainer.training.stopping import StopConsensus
from llm_trainer.training.trainer_config import ArgumentSources, TrainerParts, build_arguments, build_trainer


class StopAfter(TrainerCallback):
    """A stop with a checkpoint after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for both after that step."""
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def spawn_ranks(
    work: Callable[..., None], arguments: tuple[Any, ...], num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run `work(number, *arguments)` in a process for each rank of one host, and wait for all of them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    for name, value in {**variables, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}.items():
        monkeypatch.setenv(name, str(value))
    torch.multiprocessing.spawn(work, arguments, nprocs=num_ranks)


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
