# SPDX-License-Identifier: Apache-2.0
"""Trainers that compare answers with a reference: what those of TRL have in common here.

The answers of a batch share sequences. The losses are TRL's own code, which reads log-probabilities of padded answers.
"""

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput

from llm_trainer.model.layers.kept_logits import keep_few_logits
from llm_trainer.training.batches.batch_facts import BatchFacts
from llm_trainer.training.batches.batch_means import NO_COUNTS, BatchMeans
from llm_trainer.training.methods.answer_rows import AnswerRows
from llm_trainer.training.methods.answers import ANSWERS, FIELDS, NO_INPUTS, AnswerCollator, Answers
from llm_trainer.training.methods.reference import ReferenceMixin, keep_own_reference
from llm_trainer.training.methods.sft import compute_with_facts
from llm_trainer.training.resumable import RunContext


class AnswerTrainer(BatchMeans, ReferenceMixin, AnswerRows):
    """A resumable trainer of answers, whose metrics are means over rows. It goes before TRL's among the bases."""

    trl_module: ModuleType  # of TRL's trainer
    data_collator: Any

    def __init__(self, *args: Any, run: RunContext, data_collator: Any = None, **kwargs: Any) -> None:
        """Take the arguments of TRL's trainer, and what a resumable trainer needs to know of its job."""
        keep_own_reference(self.trl_module)
        arguments = kwargs["args"]
        asks_first, arguments.precompute_ref_log_probs = arguments.precompute_ref_log_probs, False  # TRL's own way
        pad = DataCollatorForLanguageModeling(kwargs["processing_class"].pad_token_id)
        super().__init__(*args, run=run, data_collator=AnswerCollator(data_collator or pad), **kwargs)
        self.use_batch_facts()
        keep_few_logits()
        self.begin_sums()
        self.begin_reference(asks_first)
        self.precompute_ref_logps = True  # TRL's loss finds the reference's log-probabilities among its inputs
        self.loss_is_scaled_for_ga = True  # by the rows of a step, where TRL takes means of batches' means

    def describe_batch(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return a batch as TRL's loss asks for it, with what the reference says of it."""
        raise NotImplementedError

    def count_rows(self, batch: dict[str, Any]) -> Mapping[str, int]:
        """Return the rows of each metric that is a mean over fewer rows than the batch has."""
        return NO_COUNTS

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return TRL's loss, and count its metrics. In a training it is the batch's share of the step's mean."""
        answers: Answers = inputs[ANSWERS]
        described = self.describe_batch(model, inputs)
        loss = self._compute_loss(partial(compute_answers, model, inputs), described, False)
        self.count_batch(answers.num_rows, answers.num_tokens, loss, self.count_rows(inputs))
        return self.scale_loss(loss, answers.num_rows, num_items_in_batch)


def compute_answers(model: Any, batch: dict[str, Any], **options: Any) -> FusedCausalLMOutput:
    """Return what the model says of a batch, as if its answers had been padded. `options` are TRL's."""
    answers: Answers = batch[ANSWERS]
    inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS}
    facts = BatchFacts.take(inputs)
    inputs |= {name: value for name, value in options.items() if name in ("output_router_logits", "use_cache")}
    outputs = compute_with_facts(model, {**inputs, "fused_lm_head": True}, facts)
    found = {name: getattr(outputs, name) for name in FIELDS if getattr(outputs, name) is not None}
    if facts.places is None:  # the values are of all tokens, and of trained ones else
        found = {name: values[outputs.label_mask] for name, values in found.items()}
    spread = {name: answers.spread(values.flatten()) for name, values in found.items()}
    return FusedCausalLMOutput(**spread, aux_loss=outputs.aux_loss)
