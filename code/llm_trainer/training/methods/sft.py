# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: TRL's SFTTrainer on rows of tokens and labels."""

import math
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.training.methods.token_sums import begin_sums, compute_means, fill_batches, sum_batch
from llm_trainer.training.methods.training_method import TrainingMethod
from llm_trainer.training.resumable import ResumableMixin, RunContext


class ResumableSFTTrainer(ResumableMixin, SFTTrainer):
    """TRL's SFTTrainer that survives stops and kills, and whose metrics are means over supervised tokens."""

    def __init__(self, *args: Any, run: RunContext, **kwargs: Any) -> None:
        """Take SFTTrainer's arguments, and what a resumable trainer needs to know of its job."""
        score_labelled_positions_only()
        super().__init__(*args, run=run, **kwargs)
        # TRL's loss is the sum over shifted labels, divided by the tokens of a step. Transformers asks the class of the
        # model how its own loss divides, which is another way for GPT-2 and Gemma 4, and is not used here.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.token_sums = begin_sums(self.args.device)  # since the last line of the training
        self.run_sums = begin_sums(self.args.device)  # up to the last line
        self.eval_sums = begin_sums(self.args.device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss. Sum up over the batch's tokens, where TRL would take means of a batch.

        Count all tokens. TRL would count the slots of a sequence, and leave out ranks at the end of an epoch.
        """

        def compute_outputs(**inputs: Any) -> Any:
            outputs = model(**inputs)
            if "fused_lm_head" in inputs:
                self.token_sums = self.token_sums + sum_batch(outputs, self.args.logging_nan_inf_filter)
            return outputs

        num_tokens, before = inputs.pop("num_tokens", None), self._total_train_tokens
        loss = super().compute_loss(compute_outputs, inputs, *args, **kwargs)
        num_tokens = inputs["attention_mask"] if num_tokens is None else num_tokens  # there is no mask of packed rows
        self._total_train_tokens = before + int(self.accelerator.reduce(num_tokens.sum()))
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. A line of the training gets its means over all tokens since the last one, and the totals the run's."""
        if "loss" in logs:
            means = compute_means(self.accelerator, self.token_sums)
            self.run_sums, self.token_sums = self.run_sums + self.token_sums, begin_sums(self.args.device)
            logs["loss"] = means["loss"]
            self._metrics["train"]["mean_token_accuracy"] = [means["mean_token_accuracy"]]
        elif "train_loss" in logs:
            train_loss = compute_means(self.accelerator, self.run_sums + self.token_sums)["loss"]
            if not math.isnan(train_loss):  # as it is of a run without a step
                logs["train_loss"] = train_loss
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation: all rows, each of them once, on any number of ranks."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1 or self.args.dataloader_drop_last:
            rows = fill_batches(rows, self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(rows)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Sum up over the tokens of a batch. Return no loss, which Transformers would gather from all ranks."""
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "num_tokens"})
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, fused_lm_head=True)
        self.eval_sums = self.eval_sums + sum_batch(outputs, self.args.logging_nan_inf_filter)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. The metrics are means over all tokens, and the ranks add up their sums once."""
        self.eval_sums = begin_sums(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = compute_means(self.accelerator, self.eval_sums)
        if not self.aux_loss_enabled:
            del means["aux_loss"]
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**metrics, **output.metrics}, num_samples=len(self.eval_dataset))


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
        *("total_flos", "entropy"),
        # What include_num_input_tokens_seen adds to each line, which has it all already.
        *("num_input_tokens_seen", "train_runtime", "train_tokens_per_second"),
    ),
)
