# SPDX-License-Identifier: Apache-2.0
"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): TRL's RLOOTrainer on prompts with rewards."""

from dataclasses import replace
from functools import partial

from trl import RLOOConfig, RLOOTrainer

from llm_trainer.training.generation.mixin import GenerationMixin
from llm_trainer.training.generation.prompts import choose_rows_of_evaluation
from llm_trainer.training.methods.grpo import GRPO


class ResumableRLOOTrainer(GenerationMixin, RLOOTrainer):
    """TRL's RLOOTrainer that survives stops and kills."""


RLOO = replace(
    GRPO,  # whose rows and metrics it has
    name="rloo",
    trainer_class=ResumableRLOOTrainer,
    config_class=RLOOConfig,
    choose_defaults=partial(choose_rows_of_evaluation, "rloo"),
)
