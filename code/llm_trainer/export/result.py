# SPDX-License-Identifier: Apache-2.0
"""The result of a training, and everything that is needed to write it down."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llm_trainer.common.hub import download_model, find_downloaded
from llm_trainer.config.sections import (
    AdapterSettings,
    DataSettings,
    ModelSettings,
    OutputSettings,
    TrackingSettings,
)
from llm_trainer.export.base_source import BaseSource
from llm_trainer.export.logits_check import CheckRow
from llm_trainer.export.stop_watch import StopWatch
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.kinds.auto_class import choose_auto_class, sees_images
from llm_trainer.model.plan import ModelPlan
from llm_trainer.training.resumable import ResumableMixin


@dataclass(frozen=True)
class ExportSettings:
    """The sections of the settings that the export depends on."""

    model: ModelSettings
    adapter: AdapterSettings
    data: DataSettings
    tracking: TrackingSettings
    output: OutputSettings


@dataclass(frozen=True)
class ExportPlaces:
    """The folders that the export writes to."""

    model_dir: Path  # the result
    output_dir: Path  # what else the job leaves, such as a result that failed its proof
    scratch_dir: Path  # nothing in it is kept


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """The result of a training, on global rank 0."""

    settings: ExportSettings
    places: ExportPlaces
    base_name: str  # the base's folder or Hub id, as the job names it
    plan: ModelPlan
    trainer: ResumableMixin
    weights: dict[str, torch.Tensor] | None  # those that were trained, where the model holds only shards of them
    rows: list[CheckRow]  # of the training
    logits: list[torch.Tensor] | None  # the trained model's on the rows; None after a stop, or a failure
    unproven: str | None  # what kept the logits from being computed; None after a stop too
    tokenizer: PreTrainedTokenizerBase
    timeline: Timeline
    watch: StopWatch

    @property
    def architecture(self) -> str:
        """The model's class in Transformers."""
        return (self.plan.config.architectures or [choose_auto_class(self.plan.config).__name__])[0]

    @property
    def base(self) -> BaseSource:
        """The base's place on the Hub, with the commit that was trained on where the Hub's cache tells it."""
        folder = Path(self.plan.folder)
        is_commit = folder.parent.name == "snapshots"
        return BaseSource(
            hub_id=None if Path(self.base_name).is_dir() else self.base_name,
            revision=folder.name if is_commit else self.settings.model.model_revision,
            sees_images=sees_images(self.plan.config),
        )

    @cached_property
    def base_folder(self) -> Path:
        """The folder of the base's files, in the cache where each rank fetched them for itself."""
        folder = Path(self.plan.folder)
        if folder.is_dir():
            return folder
        revision = self.settings.model.model_revision
        return find_downloaded(self.plan.folder, revision) or Path(download_model(self.plan.folder, revision, True))
