# SPDX-License-Identifier: Apache-2.0
"""The LoRA adapter that a job asks for (Hu et al. 2021, arXiv:2106.09685)."""

import re

from peft import LoraConfig, TaskType

from llm_trainer.settings import Settings

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output layer


def build_lora(settings: Settings) -> LoraConfig:
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=as_peft_targets(settings.target_modules),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def as_peft_targets(targets: str | list[str]) -> str | list[str]:
    """PEFT matches a string against whole module paths, so that a plain name must become a list to match its end."""
    if targets == "auto":
        return ALL_LINEAR
    if isinstance(targets, str) and targets != ALL_LINEAR and re.fullmatch(r"[\w.]+", targets):
        return [targets]
    return targets
