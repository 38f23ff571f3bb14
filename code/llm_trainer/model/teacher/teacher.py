# SPDX-License-Identifier: Apache-2.0
"""The teacher of a distillation, checked by its config and tokenizer, and loaded beside its student on each rank.

It is found, fetched and loaded like a base. What is wrong with it is told by the names of its own settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import compute_sampled_digest
from llm_trainer.config.sections import AdapterSettings, ModelSettings, ParallelismSettings
from llm_trainer.config.teacher import about_teacher
from llm_trainer.model.attention import choose_attention, find_faults, read_needs
from llm_trainer.model.device import Device
from llm_trainer.model.loading import LoadOptions, build_skeleton, check_fit, fetch_model, load_model, read_config
from llm_trainer.model.plan import ModelPlan
from llm_trainer.model.quantization import build_quantization, find_quantization_problems, keep_tower
from llm_trainer.model.teacher.vocabulary import check_vocabulary

ANY_SPREAD = ParallelismSettings()  # a teacher is on each rank as a whole


@dataclass(frozen=True)
class TeacherSource:
    """The place of a teacher, and its settings by the names of a base's."""

    place: str  # a folder, or a Hub id; "" for none
    settings: ModelSettings


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher that fits its student, before its weights are loaded."""

    folder: str
    config: PreTrainedConfig
    settings: ModelSettings  # by the names of a base's
    skeleton: PreTrainedModel  # on the meta device

    def describe(self) -> str:
        """Return a line for the log."""
        number = sum(parameter.numel() for parameter in self.skeleton.parameters())
        return f"Teacher: {type(self.skeleton).__name__} of {number:,} weights, with the student's vocabulary"

    @property
    def identity(self) -> str:
        """Words for its weights and how they are rounded, for a run that goes on from its checkpoints."""
        digest = compute_sampled_digest(Path(self.folder)) or f"{self.folder} {self.settings.model_revision}"
        bits = [name for name in ("load_in_4bit", "load_in_8bit") if self.settings.value(name)]
        return " ".join([digest[:12], *bits, self.settings.bnb_4bit_quant_type * self.settings.load_in_4bit]).strip()


@dataclass(frozen=True)
class StudentVocabulary:
    """The vocabulary of a student, which its teacher has to share."""

    config: PreTrainedConfig
    words: Mapping[str, int] | None  # tokens with their numbers, special ones among them; None: not compared


def fetch_teacher(
    source: TeacherSource, student: StudentVocabulary, scratch_dir: Path, with_weights: bool = True
) -> Teacher:
    """Return a teacher from a folder or the Hub. Raise UserError where it does not fit its student."""
    settings = source.settings
    with about_teacher():
        folder = fetch_model(source.place, settings, scratch_dir, with_weights, name="teacher")
        config = read_config(folder, settings)
        check_vocabulary(settings, folder, config, student.config, student.words)
        if problems := list(find_quantization_problems(folder, config, settings, AdapterSettings(), ANY_SPREAD)):
            raise UserError(*problems)
        check_fit(folder, config, settings)
        return Teacher(folder, config, settings, build_skeleton(folder, config, settings.trust_remote_code))


@dataclass(frozen=True, eq=False)
class TeacherPlan:
    """A teacher that fits its student, and how it is loaded."""

    teacher: Teacher
    options: LoadOptions


def prepare_teacher(
    source: TeacherSource, student: ModelPlan, tokenizer: PreTrainedTokenizerBase, scratch_dir: Path
) -> TeacherPlan | None:
    """Return the plan of a student's teacher, None where the source has no place.

    Raise UserError where the teacher does not fit its student.
    """
    if not source.place:
        return None
    teacher = fetch_teacher(source, StudentVocabulary(student.config, tokenizer.get_vocab()), scratch_dir)
    log.info(teacher.describe())
    return plan_teacher(teacher, student.precision.compute, student.device, student.attention.name)


def plan_teacher(teacher: Teacher, dtype: torch.dtype, device: Device, attention: str) -> TeacherPlan:
    """Return how a teacher is loaded to compute in `dtype`, with the student's attention kernel if it can.

    Raise UserError where it cannot be quantized on the device.
    """
    needs, faults = read_needs(teacher.skeleton), find_faults(device)
    with about_teacher():
        quantization = build_quantization(teacher.config, teacher.settings, dtype, device)
        quantization = keep_tower(quantization, teacher.skeleton)
    try:
        kernel = choose_attention(needs, attention, dtype, device, faults)
    except UserError:
        kernel = choose_attention(needs, "auto", dtype, device, faults)
    return TeacherPlan(teacher, LoadOptions(dtype, kernel.name, quantization))


def load_teacher(plan: TeacherPlan, device: torch.device) -> PreTrainedModel:
    """Return the teacher on the device, frozen. Raise UserError when its files are broken."""
    with about_teacher():
        model = load_model(plan.teacher.folder, plan.teacher.settings, plan.options, device)
    return model.requires_grad_(False).eval()
