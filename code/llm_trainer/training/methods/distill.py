# SPDX-License-Identifier: Apache-2.0
"""Distillation (Hinton et al. 2015, arXiv:1503.02531): TRL's DistillationTrainer on the answers that rows have.

TRL's student learns on answers that it writes itself (Agarwal et al. 2023, arXiv:2306.13649). Here both models read the
same sequences, packed or padded, and the loss is TRL's own code on the tokens that have a label.
"""

from typing import Any

import torch
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.lora import find_base_model
from llm_trainer.training.batches.batch_facts import PLACES, BatchFacts, FindFacts, known, use_facts
from llm_trainer.training.batches.batch_means import BatchMeans
from llm_trainer.training.methods.answer_rows import AnswerRows
from llm_trainer.training.methods.training_method import TRAINER_METRICS, TrainingMethod
from llm_trainer.training.resumable import ResumableMixin, RunContext


class WrittenAnswers(DistillationTrainer):
    """TRL's trainer with the batches of any other trainer, where it would have the student write answers first."""

    _get_train_sampler = Trainer._get_train_sampler
    _get_eval_sampler = Trainer._get_eval_sampler
    get_eval_dataloader = Trainer.get_eval_dataloader
    _prepare_inputs = Trainer._prepare_inputs


class ResumableDistillationTrainer(BatchMeans, ResumableMixin, AnswerRows, WrittenAnswers):
    """TRL's DistillationTrainer that survives stops and kills, with metrics that are means over supervised tokens.

    The teacher reads a batch before the student does: of what it computes, the last hidden states alone stay.
    """

    data_collator: Any
    columns = ("input_ids", "labels", "seq_lengths")
    metric_names = ("loss", "entropy")

    def __init__(self, *args: Any, run: RunContext, data_collator: Any = None, **kwargs: Any) -> None:
        """Take the arguments of TRL's trainer, and what a resumable trainer needs to know of its job."""
        tokenizer, arguments = kwargs["processing_class"], kwargs["args"]
        # It is not told of the teacher, which Accelerate would shard with FSDP. Each rank has a whole one.
        super().__init__(*args, run=run, **kwargs)
        assert run.teacher is not None, "method=distill needs a teacher"
        self.teacher_model = run.teacher.requires_grad_(False).eval()
        for model in (find_base_model(self.model), self.teacher_model):
            use_facts(model.base_model)
            add_fused_lm_head(model)  # by which the loss is checked before the training
        pad = DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=arguments.pad_to_multiple_of)
        self.data_collator = FindFacts(data_collator or pad)
        self.begin_sums()

    def count_items(self, batch: dict[str, Any]) -> int:
        """Return the supervised tokens of a batch, over which the loss is a mean."""
        return len(batch[PLACES])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return TRL's loss, and count its metrics. In a training it is the batch's share of the step's mean."""
        self.batch = dict(inputs)  # that both models read
        num_items, num_tokens = self.count_items(inputs), take_num_tokens(self.batch)
        with torch.no_grad(), self.accelerator.autocast():
            self.taught = self.read_states(self.teacher_model)
        scored = torch.ones(1, num_items, dtype=torch.long, device=self.taught.device)
        no_prompt = scored[:, :0]
        described = {"prompt_ids": no_prompt, "prompt_mask": no_prompt}
        loss = super().compute_loss(model, {**described, "completion_ids": scored, "completion_mask": scored})
        self.count_batch(num_items, num_tokens, loss)
        return self.scale_loss(loss, num_items, num_items_in_batch)

    def _compute_loss(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return TRL's loss of a batch, in the training's mixed precision: TRL goes around Accelerate's."""
        with self.accelerator.autocast():
            return super()._compute_loss(*args)

    def _get_last_hidden_state(self, unwrapped_model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the last hidden states [1, scored, width] of the batch."""
        return self.taught if unwrapped_model is self.teacher_model else self.read_states(unwrapped_model)

    def read_states(self, model: Any) -> torch.Tensor:
        """Have a model read the batch. Return its last hidden states of the tokens that predict a label."""
        inputs = dict(self.batch)
        facts = BatchFacts.take(inputs)
        del inputs["labels"]
        with known(facts):
            return find_base_model(model).base_model(**inputs, use_cache=False).last_hidden_state


def take_num_tokens(batch: dict[str, Any]) -> int:
    """Return the tokens that a batch has models read, and take their count out of a packed one.

    A row without a label fills the batch, and does not count.
    """
    if "num_tokens" in batch:
        return int(batch.pop("num_tokens").sum())
    has_label = (batch["labels"] != IGNORED).any(dim=-1, keepdim=True)
    return int((batch["attention_mask"] * has_label).sum())


DISTILL = TrainingMethod(
    name="distill",
    trainer_class=ResumableDistillationTrainer,
    config_class=DistillationConfig,
    fixed_arguments={},
    learning_rate=2e-5,
    columns=("input_ids", "labels"),
    metric_names=RENAMED,
    hidden_metrics=(*TRAINER_METRICS, "step_time"),
)
