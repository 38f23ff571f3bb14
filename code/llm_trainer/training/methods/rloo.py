# SPDX-License-Identifier: Apache-2.0
"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): TRL's RLOOTrainer on prompts with rewards."""

from functools import partial

from trl import RLOOConfig, RLOOTrainer

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.training.generation.mixin import GenerationMixin
from llm_trainer.training.generation.prompts import COLUMNS, choose_rows_of_evaluation
from llm_trainer.training.methods.grpo import HIDDEN_METRICS
from llm_trainer.training.methods.training_method import TrainingMethod


class ResumableRLOOTrainer(GenerationMixin, RLOOTrainer):
    """TRL's RLOOTrainer that survives stops and kills."""


RLOO = TrainingMethod(
    name="rloo",
    trainer_class=ResumableRLOOTrainer,
    config_class=RLOOConfig,
    fixed_arguments={},
    learning_rate=1e-6,
    columns=COLUMNS,
    metric_names=RENAMED,
    hidden_metrics=HIDDEN_METRICS,
    best_metric="eval_reward",
    choose_defaults=partial(choose_rows_of_evaluation, "rloo"),
)
