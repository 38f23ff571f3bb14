# SPDX-License-Identifier: Apache-2.0
"""Reward models (Ouyang et al. 2022, arXiv:2203.02155): TRL's RewardTrainer on rows of two answers.

The answers of a batch share sequences, and each one's reward is read at its last token. The loss is TRL's own code.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.layers.reward_head import read_last_tokens
from llm_trainer.model.lora import find_base_model
from llm_trainer.training.batches.batch_facts import BatchFacts, known
from llm_trainer.training.batches.batch_means import BatchMeans
from llm_trainer.training.methods.answer_rows import AnswerRows
from llm_trainer.training.methods.answers import (
    ANSWERS,
    NO_INPUTS,
    BatchPart,
    Collator,
    is_trained,
    keep_trained,
    list_answers,
)
from llm_trainer.training.methods.training_method import TRAINER_METRICS, TrainingMethod
from llm_trainer.training.resumable import ResumableMixin, RunContext


@dataclass(frozen=True)
class RewardedAnswers(BatchPart):
    """The last tokens of a batch's answers, the chosen ones first."""

    ends: torch.Tensor  # [answers], their slots in the sequences end to end
    margins: torch.Tensor  # [pairs], by which the rewards should differ at least
    num_tokens: int  # read by the model, with those of prompts
    is_blank: bool  # whether the pair only fills a rank's batch, and counts for nothing

    @property
    def num_rows(self) -> int:
        """The pairs that count."""
        return 0 if self.is_blank else len(self.margins)


@dataclass(frozen=True)
class RewardCollator:
    """Makes a batch of answers out of rows of pairs. Another collator packs or pads them."""

    collate: Collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other collator, and its answers. Rows that only fill the batch are left out.

        Labels stand at the last tokens alone: they are what the model is asked for.
        """
        kept = keep_trained(examples)
        is_blank = not is_trained(kept[0])
        answers = [
            ids if len(ids) > 1 else ids * 2 for ids in (answer["input_ids"] for answer in list_answers(kept))
        ]  # a first token takes no label
        # By its number each answer is found again wherever the other collator puts it.
        numbered = [
            {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + [number]} for number, ids in enumerate(answers)
        ]
        batch = self.collate(numbered)
        numbers = batch["labels"].flatten()
        places = (numbers != IGNORED).nonzero().squeeze(1)
        margins = torch.tensor([example["margin"] for example in kept])
        num_tokens = 0 if is_blank else sum(map(len, answers))
        batch[ANSWERS] = RewardedAnswers(places[numbers[places].argsort()], margins, num_tokens, is_blank)
        return batch


class ResumableRewardTrainer(BatchMeans, ResumableMixin, AnswerRows, RewardTrainer):
    """TRL's RewardTrainer that survives stops and kills, on packed answers, with metrics that are means over pairs."""

    data_collator: Any
    columns = ("input_ids", "labels", "seq_lengths", "margin")
    sequences_a_row = 2
    metric_names = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")

    def __init__(self, *args: Any, run: RunContext, data_collator: Any = None, **kwargs: Any) -> None:
        """Take RewardTrainer's arguments, and what a resumable trainer needs to know of its job."""
        pad = DataCollatorForLanguageModeling(kwargs["processing_class"].pad_token_id)
        super().__init__(*args, run=run, data_collator=RewardCollator(data_collator or pad), **kwargs)
        read_last_tokens(find_base_model(self.model))
        self.use_batch_facts()
        self.begin_sums()
        self.loss_is_scaled_for_ga = True  # by the pairs of a step, where TRL takes means of batches' means

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return TRL's loss, and count its metrics. In a training it is the batch's share of the step's mean."""
        answers: RewardedAnswers = inputs[ANSWERS]
        asked = {"margin": answers.margins, "attention_mask": answers.ends.new_zeros(1)}  # whose tokens TRL counts
        loss, outputs = super().compute_loss(partial(compute_rewards, model, inputs), asked, return_outputs=True)
        low, high = outputs.logits.detach().view(2, -1).aminmax(dim=0)
        found = self._metrics["train" if self.model.training else "eval"]
        found["min_reward"], found["max_reward"] = [low.mean().item()], [high.mean().item()]  # not of a batch's size
        self.count_batch(answers.num_rows, answers.num_tokens, loss)
        return self.scale_loss(loss, answers.num_rows, num_items_in_batch)


def compute_rewards(model: Any, batch: dict[str, Any], **options: Any) -> SequenceClassifierOutput:
    """Return the rewards [answers, 1] of a batch, the chosen answers' first. `options` are TRL's."""
    inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS | {"labels"}}
    facts = replace(BatchFacts.take(inputs), places=None)
    with known(facts):
        return model(**inputs, ends=batch[ANSWERS].ends, use_cache=options["use_cache"])


REWARD = TrainingMethod(
    name="reward",
    trainer_class=ResumableRewardTrainer,
    config_class=RewardConfig,
    fixed_arguments={"max_length": None},
    learning_rate=1e-5,
    columns=ResumableRewardTrainer.columns,
    metric_names=RENAMED,
    hidden_metrics=TRAINER_METRICS,
)
