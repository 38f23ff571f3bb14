# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): TRL's DPOTrainer on rows of two answers.

The answers of a batch share sequences. The losses are TRL's own code, which reads log-probabilities of padded answers.
"""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.model.layers.kept_logits import keep_few_logits
from llm_trainer.training.methods.batch_facts import BatchFacts, FindFacts, use_facts
from llm_trainer.training.methods.batch_means import BatchMeans
from llm_trainer.training.methods.pairs import FIELDS, PAIRS, PairCollator, Pairs
from llm_trainer.training.methods.reference import ReferenceMixin, keep_own_reference
from llm_trainer.training.methods.sft import compute_with_facts
from llm_trainer.training.methods.training_method import TrainingMethod
from llm_trainer.training.resumable import RunContext

COLUMNS = ("input_ids", "labels", "seq_lengths", "row")
REFERENCE_NAMES = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's


class ResumableDPOTrainer(BatchMeans, ReferenceMixin, DPOTrainer):
    """TRL's DPOTrainer that survives stops and kills, on packed answers, with metrics that are means over pairs."""

    data_collator: Any
    sequences_a_row = 2
    metric_names = (
        *("loss", "aux_loss", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen"),
        *("logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    )

    def __init__(self, *args: Any, run: RunContext, data_collator: Any = None, **kwargs: Any) -> None:
        """Take DPOTrainer's arguments, and what a resumable trainer needs to know of its job."""
        keep_own_reference(dpo_trainer)
        arguments = kwargs["args"]
        asks_first, arguments.precompute_ref_log_probs = arguments.precompute_ref_log_probs, False  # TRL's own way
        pad = DataCollatorForLanguageModeling(kwargs["processing_class"].pad_token_id)
        super().__init__(*args, run=run, data_collator=PairCollator(data_collator or pad), **kwargs)
        self.use_batch_facts()
        keep_few_logits()
        self.begin_sums()
        self.begin_reference(asks_first)
        self.precompute_ref_logps = True  # TRL's loss finds the reference's log-probabilities among its inputs
        self.loss_is_scaled_for_ga = True  # by the pairs of a step, where TRL takes means of batches' means

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

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Return the pairs of a step on all ranks."""
        own = torch.tensor(sum(batch[PAIRS].num_pairs for batch in batch_samples), device=device)
        return self.accelerator.reduce(own)

    def ask_reference(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities [pairs, 2] that the reference gives chosen and rejected answers."""
        pairs: Pairs = batch[PAIRS]
        said = self.compute_ref_log_probs(partial(compute_answers, self.model, batch), pairs.describe_answers())
        return torch.stack(said, dim=-1)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return TRL's loss, and count its metrics. In a training it is the batch's share of the step's mean."""
        pairs: Pairs = inputs[PAIRS]
        reference = dict(zip(REFERENCE_NAMES, self.find_reference(inputs).unbind(-1), strict=True))
        loss = self._compute_loss(partial(compute_answers, model, inputs), pairs.describe_answers() | reference, False)
        self.count_batch(pairs.num_pairs, pairs.num_tokens, loss)
        if num_items_in_batch is None:
            return loss
        return loss * (pairs.num_pairs * self.args.world_size / num_items_in_batch)  # DDP takes the mean of ranks


def compute_answers(model: Any, batch: dict[str, Any], **options: Any) -> FusedCausalLMOutput:
    """Return what the model says of a batch, as if its answers had been padded. `options` are TRL's."""
    pairs: Pairs = batch[PAIRS]
    inputs = {name: value for name, value in batch.items() if name not in (PAIRS, "num_tokens")}
    facts = BatchFacts.take(inputs)
    inputs |= {name: value for name, value in options.items() if name in ("output_router_logits", "use_cache")}
    outputs = compute_with_facts(model, {**inputs, "fused_lm_head": True}, facts)
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
    hidden_metrics=(
        *("total_flos", "entropy", "logits/chosen", "logits/rejected"),
        *("num_input_tokens_seen", "train_runtime", "train_tokens_per_second"),
    ),
)
