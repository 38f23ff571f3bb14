# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: TRL's SFTTrainer on rows of tokens and labels."""

from typing import Any

from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.training.methods.training_method import TrainingMethod
from llm_trainer.training.resumable import ResumableMixin, RunContext


class ResumableSFTTrainer(ResumableMixin, SFTTrainer):
    """TRL's SFTTrainer that survives stops and kills, and counts the tokens of packed rows."""

    def __init__(self, *args: Any, run: RunContext, **kwargs: Any) -> None:
        """Take SFTTrainer's arguments, and what a resumable trainer needs to know of its job."""
        score_labelled_positions_only()
        super().__init__(*args, run=run, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss. Count the tokens of packed rows, where TRL would count the slots of one sequence."""
        num_tokens, before = inputs.pop("num_tokens", None), self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if num_tokens is not None and self.model.training:
            self._total_train_tokens = before + int(self.accelerator.reduce(num_tokens.sum()))
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss


def score_labelled_positions_only() -> None:
    """Have TRL's LM head score only positions with a label on a CPU too, as it does on a GPU.

    Where Triton does not run, TRL scores all positions, for devices that compile for fixed shapes. A CPU does not, and
    the head of a small model is a third of its step. TRL has no option for it: the function that it asks is replaced in
    this process.
    """
    trl_utils._use_triton = lambda device: True


SFT = TrainingMethod(
    name="sft",
    trainer_class=ResumableSFTTrainer,
    config_class=SFTConfig,
    columns=("input_ids", "labels"),
    metric_names=RENAMED,
    hidden_metrics=(
        *("total_flos", "entropy", "eval_entropy", "eval_num_tokens"),
        # What include_num_input_tokens_seen adds to each line, which has it all already.
        *("num_input_tokens_seen", "train_runtime", "train_tokens_per_second"),
    ),
)
