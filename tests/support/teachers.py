# SPDX-License-Identifier: Apache-2.0
"""Teachers of the tiny model: wider than it, with weights by which tokens differ, and its tokenizer."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llm_trainer.config.schema import Settings
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.teacher.teacher import Teacher

WIDTH_FACTOR = 2


def build_teacher(student: Path) -> PreTrainedModel:
    """Return a teacher, the same one each time."""
    config = AutoConfig.from_pretrained(student)
    config.hidden_size *= WIDTH_FACTOR
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in teacher.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return teacher


def describe_teacher(config: PreTrainedConfig) -> Teacher:
    """Return a teacher with this config, as far as a plan looks at one."""
    return Teacher("", config, Settings().model, build_on_meta(config, torch.bfloat16, trust_remote_code=False))


def write_teacher(student: Path, folder: Path) -> Path:
    """Write a teacher with the student's tokenizer, and return its folder."""
    build_teacher(student).save_pretrained(folder)
    for file in student.glob("*"):
        if not (folder / file.name).exists() and "safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    return folder
