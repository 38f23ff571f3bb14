# SPDX-License-Identifier: Apache-2.0
"""The state of a trainer between two steps, to which a stop in the middle of a step goes back.

A checkpoint holds weights, optimizer and scheduler, which a half step leaves alone. What it moves on is kept here.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Trainer, set_seed


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Have all random numbers depend on the run's seed, the step and the rank, and on nothing that was drawn before."""
    set_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


@dataclass(frozen=True)
class RandomState:
    """The state of all random numbers that a step draws."""

    python: tuple[Any, ...]
    numpy: dict[str, Any] | tuple[Any, ...]
    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def read(cls, device: torch.device) -> "RandomState":
        """Return the state of this moment. `device` is the one that this process trains on."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)

    def restore(self, device: torch.device) -> None:
        """Go on from this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


@dataclass(frozen=True)
class StepCounts:
    """The sums that every batch of a step adds to."""

    loss: torch.Tensor  # since the last line of metrics
    num_tokens: int
    flos: float
    metrics: dict[str, list[Any]]  # of TRL's trainers, since the last line of metrics
    line_sums: Any  # of trainers that sum up by themselves, since the last line of metrics; None for others

    @classmethod
    def read(cls, trainer: Trainer) -> "StepCounts":
        """Return the sums of this moment."""
        metrics = {name: list(values) for name, values in getattr(trainer, "_metrics", {}).get("train", {}).items()}
        return cls(
            trainer._tr_loss.clone(),
            trainer._total_train_tokens,
            trainer.current_flos,
            metrics,
            getattr(trainer, "line_sums", None),
        )

    def restore(self, trainer: Trainer) -> None:
        """Give the trainer these sums back."""
        trainer._tr_loss, trainer._total_train_tokens = self.loss, self.num_tokens
        trainer.current_flos = self.flos
        if self.line_sums is not None:
            trainer.line_sums = self.line_sums
        if hasattr(trainer, "_metrics"):
            trainer._metrics["train"].clear()
            trainer._metrics["train"].update(self.metrics)
