# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): TRL's DPOTrainer on rows of two answers.

The answers of a batch share sequences. The losses are TRL's own code, which reads log-probabilities of padded answers.
"""

from functools import partial
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.training.methods.answer_trainer import AnswerTrainer, compute_answers
from llm_trainer.training.methods.answers import ANSWERS
from llm_trainer.training.methods.training_method import TRAINER_METRICS, TrainingMethod

REFERENCE_NAMES = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's


class ResumableDPOTrainer(AnswerTrainer, DPOTrainer):
    """TRL's DPOTrainer that survives stops and kills, on packed answers, with metrics that are means over pairs."""

    trl_module = dpo_trainer
    columns = ("input_ids", "labels", "seq_lengths", "row")
    sequences_a_row = 2
    metric_names = (
        *("loss", "aux_loss", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen"),
        *("logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    )

    def ask_reference(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities [pairs, 2] that the reference gives chosen and rejected answers."""
        said = self.compute_ref_log_probs(partial(compute_answers, self.model, batch), batch[ANSWERS].describe())
        return torch.stack(said, dim=-1)

    def describe_batch(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return a batch as TRL's loss asks for it, with what the reference says of it."""
        reference = dict(zip(REFERENCE_NAMES, self.find_reference(batch).unbind(-1), strict=True))
        return batch[ANSWERS].describe() | reference


DPO = TrainingMethod(
    name="dpo",
    trainer_class=ResumableDPOTrainer,
    config_class=DPOConfig,
    fixed_arguments={"max_length": None},
    learning_rate=1e-6,
    columns=ResumableDPOTrainer.columns,
    metric_names=RENAMED,
    hidden_metrics=(*TRAINER_METRICS, "entropy", "logits/chosen", "logits/rejected"),
)
