# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300): TRL's GRPOTrainer with rewards."""

from functools import partial

from trl import GRPOConfig, GRPOTrainer

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.training.generation.mixin import GenerationMixin
from llm_trainer.training.generation.prompts import COLUMNS, choose_rows_of_evaluation
from llm_trainer.training.methods.training_method import TRAINER_METRICS, TrainingMethod

# Metrics of trainers that write completions which no line shows.
HIDDEN_METRICS = (
    *(*TRAINER_METRICS, "step_time"),
    *("completions/min_length", "completions/max_length", "completions/mean_terminated_length"),
    *("completions/min_terminated_length", "completions/max_terminated_length"),
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
    *("cispo_clip_ratio", "vespo/phi_seq_mean", "policy_loss", "entropy_coef", "eval_policy_loss"),
)
HIDDEN_METRICS += tuple(f"eval_{name}" for name in (*HIDDEN_METRICS, "num_tokens"))


class ResumableGRPOTrainer(GenerationMixin, GRPOTrainer):
    """TRL's GRPOTrainer that survives stops and kills."""

    def list_controls(self) -> tuple[str, ...]:
        """Return the names of numbers that follow the entropy."""
        return ("entropy_coef", "_last_world_entropy")


GRPO = TrainingMethod(
    name="grpo",
    trainer_class=ResumableGRPOTrainer,
    config_class=GRPOConfig,
    fixed_arguments={},
    learning_rate=1e-6,
    columns=COLUMNS,
    metric_names=RENAMED,
    hidden_metrics=HIDDEN_METRICS,
    best_metric="eval_reward",
    choose_defaults=partial(choose_rows_of_evaluation, "grpo"),
)
