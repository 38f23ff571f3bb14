# SPDX-License-Identifier: Apache-2.0
"""What the training of a job has ended with, and what is needed to write it down."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llm_trainer.common.hub import download_model
from llm_trainer.job.job import Job
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.plan import ModelPlan
from llm_trainer.training.resumable_trainer import ResumableTrainer


@dataclass(frozen=True, eq=False)
class Trained:
    """What the training has ended with, on global rank 0."""

    job: Job
    plan: ModelPlan
    trainer: ResumableTrainer
    weights: dict[str, torch.Tensor] | None  # what was trained, where the model holds but shards of it
    rows: list[list[int]]  # tokens of training rows
    logits: list[torch.Tensor] | None  # the trained model's on the rows; None after a stop, as there is no time for it
    tokenizer: PreTrainedTokenizerBase
    scratch_dir: Path
    timeline: Timeline

    @property
    def architecture(self) -> str:
        """The model's class in Transformers."""
        return (self.plan.config.architectures or ["AutoModelForCausalLM"])[0]

    @property
    def base_id(self) -> str | None:
        """The base's name on the Hub; None for a folder, of which it is not known."""
        name = self.job.inputs.model
        return None if Path(name).is_dir() else name

    @property
    def base_revision(self) -> str | None:
        """The commit that was trained on, where the Hub's cache tells it, else what was asked for."""
        folder = Path(self.plan.folder)
        return folder.name if folder.parent.name == "snapshots" else self.job.settings.model.model_revision

    @cached_property
    def base_folder(self) -> Path:
        """The folder of the base's files, from the cache where each rank fetched them for itself."""
        folder = Path(self.plan.folder)
        if folder.is_dir():
            return folder
        return Path(download_model(self.plan.folder, self.job.settings.model.model_revision, with_weights=True))
