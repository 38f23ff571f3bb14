# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: TRL's SFTTrainer on rows of tokens and labels."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from llm_trainer.common import log
from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.layers.kept_logits import keep_few_logits
from llm_trainer.model.lora import find_base_model
from llm_trainer.training.batches.batch_facts import BatchFacts, FindFacts, known, shift_labels, use_facts
from llm_trainer.training.batches.token_sums import begin_sums, compute_means, sum_batch
from llm_trainer.training.batches.whole_batches import WholeBatches
from llm_trainer.training.methods.training_method import TRAINER_METRICS, TrainingMethod
from llm_trainer.training.resumable import ResumableMixin, RunContext


class ResumableSFTTrainer(ResumableMixin, WholeBatches, SFTTrainer):
    """TRL's SFTTrainer that survives stops and kills, and whose metrics are means over supervised tokens.

    Between two lines it waits for no GPU, and ranks talk for gradients and once a step for the number of its tokens.
    """

    data_collator: Any

    def __init__(self, *args: Any, run: RunContext, **kwargs: Any) -> None:
        """Take SFTTrainer's arguments, and what a resumable trainer needs to know of its job."""
        super().__init__(*args, run=run, **kwargs)
        self.use_batch_facts()
        keep_few_logits()
        # TRL's loss is the sum over shifted labels, divided by the tokens of a step. Transformers asks the class of the
        # model how its own loss divides, which is another way for GPT-2 and Gemma 4, and is not used here.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        # TRL gathers its metrics of each batch from all ranks and waits for them, and Transformers for each loss. Both
        # would keep the GPU waiting. The sums below are read once a line.
        self.accelerator.gather_for_metrics = gather_nothing
        self.skips_nan, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        self.line_sums = begin_sums(self.args.device)  # since the last line of the training
        self.run_sums = begin_sums(self.args.device)  # up to the last line
        self.eval_sums = begin_sums(self.args.device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss. Sum up over the batch's tokens, where TRL would take means of a batch.

        Count all tokens. TRL would count the slots of a sequence, and leave out ranks at the end of an epoch.
        """
        facts, counts = BatchFacts.take(inputs), inputs.pop("num_tokens", None)
        packed = "attention_mask" not in inputs
        if packed:  # without a mask TRL would put a number on the device, and wait for that
            inputs["attention_mask"] = counts
        elif counts is None:  # a row without a label fills the batch
            has_label = (inputs["labels"] != IGNORED).any(dim=-1, keepdim=True)
            counts = inputs["attention_mask"] * has_label
        all_tokens = counts.sum()

        def compute_outputs(**inputs: Any) -> Any:
            if packed:
                del inputs["attention_mask"]
            outputs = compute_with_facts(model, inputs, facts)
            if "fused_lm_head" in inputs:
                self.line_sums = self.line_sums + sum_batch(outputs, all_tokens, self.skips_nan)
            return outputs

        return super().compute_loss(compute_outputs, inputs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the images of rows, which the collator opens."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "pictures"]

    def use_batch_facts(self) -> None:
        """Have batches bring facts that their own rank finds. Batches that one rank makes for all cannot."""
        use_facts(find_base_model(self.model).base_model)
        is_own = isinstance(self.train_dataset, Dataset) and not self.accelerator.dispatch_batches
        if is_own and not self.args.torch_compile:  # which would compile anew for each number of labels
            self.data_collator = FindFacts(self.data_collator)

    def count_tokens(self) -> int:
        """Return the tokens trained on so far, also since the last line. Every rank must call this."""
        return self.num_tokens + compute_means(self.accelerator, self.line_sums).all_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. A line of the training gets its means over all tokens since the last one, and the totals the run's."""
        metrics = self._metrics["train"]
        if "loss" in logs:
            since = compute_means(self.accelerator, self.line_sums)
            self.run_sums, self.line_sums = self.run_sums + self.line_sums, begin_sums(self.args.device)
            self._total_train_tokens += since.all_tokens
            logs["loss"] = since.means["loss"]
            metrics["mean_token_accuracy"] = [since.means["mean_token_accuracy"]]
            metrics["num_tokens"] = [self._total_train_tokens]
            if self.aux_loss_enabled:
                metrics["aux_loss"] = [since.means["aux_loss"]]
            self.warn_of_lost_batches(since.lost_batches)
        elif "train_loss" in logs:
            metrics.clear()
            train_loss = compute_means(self.accelerator, self.run_sums + self.line_sums).means["loss"]
            if not math.isnan(train_loss):  # as it is of a run without a step
                logs["train_loss"] = train_loss
        super().log(logs, start_time)

    def warn_of_lost_batches(self, num_batches: int) -> None:
        """Warn where losses since the last line are not-a-number or infinite."""
        if num_batches and self.state.is_world_process_zero:
            counted = "; the means leave them out" if self.skips_nan else ""
            log.warning(
                f"The loss of {num_batches} batches up to step {self.state.global_step} is no finite number{counted}: "
                "where this goes on, the training has diverged; lower learning_rate."
            )

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Sum up over the tokens of a batch. Return no loss, which Transformers would gather from all ranks."""
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "num_tokens"})
        facts = BatchFacts.take(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = compute_with_facts(model, {**inputs, "fused_lm_head": True}, facts)
        self.eval_sums = self.eval_sums + sum_batch(outputs, outputs.label_mask.sum(), self.skips_nan)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. The metrics are means over all tokens, and the ranks add up their sums once."""
        self.eval_sums = begin_sums(self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = compute_means(self.accelerator, self.eval_sums).means
        if not self.aux_loss_enabled:
            del means["aux_loss"]
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**metrics, **output.metrics}, num_samples=len(self.eval_dataset))


def gather_nothing(tensor: torch.Tensor) -> np.ndarray:
    """Return a zero for the numbers of a batch, in the place of Accelerate's `gather_for_metrics`."""
    return np.zeros(1, dtype=np.int64)


def compute_with_facts(model: Any, inputs: dict[str, Any], facts: BatchFacts) -> Any:
    """Return the model's outputs, with TRL's output layer those of the tokens at `facts.places` where they are known.

    The logits of a loss that needs them are those of all tokens.
    """
    if "fused_lm_head" not in inputs:
        facts = replace(facts, places=None)
    if facts.places is not None:
        inputs = {**inputs, "labels": None, "shift_labels": shift_labels(inputs["labels"], facts.places)}
    with known(facts):
        return model(**inputs)


SFT = TrainingMethod(
    name="sft",
    trainer_class=ResumableSFTTrainer,
    config_class=SFTConfig,
    fixed_arguments={"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
    learning_rate=2e-5,
    columns=("input_ids", "labels"),
    metric_names=RENAMED,
    hidden_metrics=(*TRAINER_METRICS, "entropy"),
)
