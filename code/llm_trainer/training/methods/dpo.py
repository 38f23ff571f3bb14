# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): TRL's DPOTrainer on rows of two answers."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.model.layers.kept_logits import keep_few_logits
from llm_trainer.training.methods.batch_facts import BatchFacts, FindFacts, use_facts
from llm_trainer.training.methods.pair_sums import PairSums
from llm_trainer.training.methods.pairs import FIELDS, PAIRS, PairCollator, Pairs
from llm_trainer.training.methods.reference import copy_adapter, hide_copy, keep_own_reference
from llm_trainer.training.methods.sft import compute_with_facts
from llm_trainer.training.methods.training_method import TrainingMethod
from llm_trainer.training.methods.whole_batches import WholeBatches
from llm_trainer.training.resumable import ResumableMixin, RunContext

COLUMNS = ("input_ids", "labels", "seq_lengths")
# Of the metrics that TRL takes of a batch.
METRIC_NAMES = (
    *("loss", "aux_loss", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen"),
    *("logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
)


class ResumableDPOTrainer(ResumableMixin, WholeBatches, DPOTrainer):
    """TRL's DPOTrainer that survives stops and kills, whose answers share sequences, with metrics over pairs.

    The losses are TRL's own code, which reads the log-probabilities of padded answers.
    """

    data_collator: Any
    sequences_a_row = 2

    def __init__(self, *args: Any, run: RunContext, data_collator: Any = None, **kwargs: Any) -> None:
        """Take DPOTrainer's arguments, and what a resumable trainer needs to know of its job."""
        keep_own_reference(dpo_trainer)
        pad = DataCollatorForLanguageModeling(kwargs["processing_class"].pad_token_id)
        super().__init__(*args, run=run, data_collator=PairCollator(data_collator or pad), **kwargs)
        self.use_batch_facts()
        keep_few_logits()
        self.loss_is_scaled_for_ga = True  # by the pairs of a step, where TRL takes means of batches' means
        self.precompute_ref_logps = True  # TRL's loss finds the reference's log-probabilities among its inputs
        self.accelerator.gather = self.accelerator.gather_for_metrics = return_own  # ranks talk once a line
        self.line_sums = PairSums()  # since the last line of the training
        self.run_sums = PairSums()  # up to the last line
        self.eval_sums = PairSums()

    def use_batch_facts(self) -> None:
        """Have batches bring facts that their own rank finds."""
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        use_facts(base.base_model)
        if not self.args.torch_compile:  # which would compile anew for each number of labels
            self.data_collator = FindFacts(self.data_collator)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """Return the rows as they are, since they are tokenized already."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of a pair, which TRL knows by other names."""
        self._signature_columns = self._signature_columns or [*COLUMNS]
        super()._set_signature_columns_if_needed()

    def train_from(self, checkpoint: Path | None) -> Any:
        """Train from the checkpoint on, or from the start, with the model as it is now for the reference."""
        if self.run.adapter_start or self.run.goes_on:
            copy_adapter(self.model)
        return super().train_from(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the weights that are trained, and not the reference's."""
        with hide_copy(self.model):
            super()._save(output_dir, state_dict)

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Return the pairs of a step on all ranks."""
        own = torch.tensor(sum(batch[PAIRS].num_pairs for batch in batch_samples), device=device)
        return self.accelerator.reduce(own)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return TRL's loss, and count its metrics. In a training it is the batch's share of the step's mean."""
        pairs: Pairs = inputs.pop(PAIRS)
        inputs.pop("num_tokens", None)
        answers = pairs.describe_answers()
        compute = partial(compute_answers, batch=inputs, facts=BatchFacts.take(inputs), pairs=pairs)
        reference = self.compute_ref_log_probs(partial(compute, self.model), answers)
        answers |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True))
        loss = self._compute_loss(partial(compute, model), answers, False)
        self.count_batch(pairs, loss)
        if num_items_in_batch is None:
            return loss
        return loss * (pairs.num_pairs * self.args.world_size / num_items_in_batch)  # DDP takes the mean of ranks

    def count_batch(self, pairs: Pairs, loss: torch.Tensor) -> None:
        """Add the metrics that TRL has taken of a batch to the sums, and take them out of TRL's lists."""
        is_training = self.model.training
        found = self._metrics["train" if is_training else "eval"]
        means = {name: found[name][-1] for name in METRIC_NAMES if name in found} | {"loss": loss.item()}
        found.clear()
        if is_training:
            self.line_sums = self.line_sums.add_batch(pairs.num_pairs, pairs.num_tokens, means)
        else:
            self.eval_sums = self.eval_sums.add_batch(pairs.num_pairs, pairs.num_tokens, means)

    # Metrics

    def list_metrics(self) -> tuple[str, ...]:
        """Return the names of the metrics of this model."""
        return tuple(name for name in METRIC_NAMES if self.aux_loss_enabled or name != "aux_loss")

    def count_tokens(self) -> int:
        """Return the tokens trained on so far, also since the last line. Every rank must call this."""
        return self.num_tokens + self.line_sums.gather(self.accelerator, ()).num_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. A line of the training gets its means over all pairs since the last one, and the totals the run's."""
        metrics = self._metrics["train"]
        if "loss" in logs:
            since = self.line_sums.gather(self.accelerator, self.list_metrics())
            self.run_sums, self.line_sums = self.run_sums + since, PairSums()
            self._total_train_tokens += since.num_tokens
            logs["loss"] = since.means["loss"]
            metrics.update({name: [mean] for name, mean in since.means.items() if name != "loss"})
            metrics["num_tokens"] = [self._total_train_tokens]
        elif "train_loss" in logs:
            whole = self.run_sums + self.line_sums.gather(self.accelerator, self.list_metrics())
            logs["train_loss"] = whole.means.get("loss", logs["train_loss"]) if whole.num_pairs else logs["train_loss"]
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Sum up over the pairs of a batch. Return no loss, which Transformers would gather from all ranks."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. The metrics are means over all pairs, and the ranks add up their sums once."""
        self.eval_sums = PairSums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.eval_sums.gather(self.accelerator, self.list_metrics()).means
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**metrics, **output.metrics}, num_samples=len(self.eval_dataset))


def return_own(values: Any) -> Any:
    """Return the values of this rank, in the place of Accelerate's `gather`: a line gathers the sums."""
    return values


def compute_answers(
    model: Any, *, batch: dict[str, Any], facts: BatchFacts, pairs: Pairs, **options: Any
) -> FusedCausalLMOutput:
    """Return what the model says of a batch, as if its answers had been padded. `options` are TRL's."""
    asked = {name: value for name, value in options.items() if name in ("output_router_logits", "use_cache")}
    outputs = compute_with_facts(model, {**batch, **asked, "fused_lm_head": True}, facts)
    found = {name: getattr(outputs, name) for name in FIELDS if getattr(outputs, name) is not None}
    if facts.places is None:  # the values are of all tokens, and of trained ones else
        found = {name: values[outputs.label_mask] for name, values in found.items()}
    spread = {name: pairs.spread(values.flatten()) for name, values in found.items()}
    return FusedCausalLMOutput(**spread, aux_loss=outputs.aux_loss)


DPO = TrainingMethod(
    name="dpo",
    trainer_class=ResumableDPOTrainer,
    config_class=DPOConfig,
    fixed_arguments={"max_length": None},
    learning_rate=1e-6,
    columns=COLUMNS,
    metric_names=RENAMED,
    hidden_metrics=("total_flos", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second"),
)
