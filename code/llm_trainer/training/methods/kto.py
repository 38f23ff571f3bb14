# SPDX-License-Identifier: Apache-2.0
"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): TRL's KTOTrainer on rows of one answer, desirable or undesirable.

Its loss compares an answer's reward with the divergence of the model from the reference, which it estimates on prompts
with answers to other prompts. Each prompt has the same other answer in every epoch. The estimate thus depends neither
on the order of rows nor on the number of ranks, and the reference can be asked first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl import KTOConfig, KTOTrainer
from trl.trainer import kto_trainer

from llm_trainer.common.metric_definitions import RENAMED
from llm_trainer.config.sections import WITHOUT_DIVERGENCE
from llm_trainer.training.batches.batch_means import RowSums
from llm_trainer.training.methods.answer_trainer import AnswerTrainer, compute_answers
from llm_trainer.training.methods.answers import ANSWERS, DESIRABLE, MISMATCHED, Answers, Collator, keep_trained
from llm_trainer.training.methods.training_method import TRAINER_METRICS, TrainingMethod


class ResumableKTOTrainer(AnswerTrainer, KTOTrainer):
    """TRL's KTOTrainer that survives stops and kills, on packed answers, with metrics that are means over rows."""

    trl_module = kto_trainer
    columns = ("input_ids", "labels", "seq_lengths", "row", "desirable", "other_ids", "other_labels")
    metric_names = (
        *("loss", "aux_loss", "kl", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of AnswerTrainer."""
        arguments = kwargs["args"]
        # TRL refuses other orders of rows than the data's, in which it looks for the mismatched answers. These come
        # with the rows here: TRL is told of a loss that needs none.
        loss_type, arguments.loss_type = arguments.loss_type, WITHOUT_DIVERGENCE
        super().__init__(*args, **kwargs)
        self.loss_type = arguments.loss_type = loss_type
        self.calculate_KL = loss_type != WITHOUT_DIVERGENCE
        self.data_collator = JudgedCollator(self.data_collator, self.calculate_KL)

    def ask_reference(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-probabilities [rows, 1 or 2] that the reference gives answers, and mismatched ones."""
        batches = [batch, batch[MISMATCHED]] if self.calculate_KL else [batch]
        coming = iter(batches)  # TRL asks the model about the one after the other
        said = self.compute_ref_log_probs(
            lambda **options: compute_answers(self.model, next(coming), **options), describe_judged(batch)
        )
        return torch.stack(said[: len(batches)], dim=-1)

    def describe_batch(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return a batch as TRL's loss asks for it, with what the reference says of it, and the divergence."""
        reference = self.find_reference(batch)
        described = describe_judged(batch) | {"label": batch[DESIRABLE], "ref_logps": reference[:, 0]}
        if self.calculate_KL:
            divergence = self.estimate_divergence(model, batch[MISMATCHED], reference[:, 1])
            described |= {"divergence": divergence, "ref_KL_logps": torch.zeros_like(divergence)}
        return described

    @torch.no_grad()
    def estimate_divergence(self, model: Any, mismatched: dict[str, Any], reference: torch.Tensor) -> torch.Tensor:
        """Return how much likelier the model finds mismatched answers than the reference, as a logarithm [1].

        It is the mean over the rows of all ranks. Every rank must call this.
        """
        answers: Answers = mismatched[ANSWERS]
        said = compute_answers(model, mismatched).log_probs.float().sum(-1)
        own = (said - reference).sum() if answers.num_rows else said.new_zeros(())
        total, num_rows = self.accelerator.reduce(torch.stack([own, own.new_tensor(answers.num_rows)]))
        return (total / num_rows.clamp(min=1))[None]

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        """Return the divergence, from which TRL subtracts the reference's zero."""
        return batch.get("divergence")

    def count_rows(self, batch: dict[str, Any]) -> Mapping[str, int]:
        """Return the rows of the metrics that are means over desirable rows, or over the others."""
        num_rows = batch[ANSWERS].num_rows
        num_chosen = min(num_rows, int(batch[DESIRABLE].sum()))
        sides = {"chosen": num_chosen, "rejected": num_rows - num_chosen}
        return {f"{kind}/{side}": number for kind in ("rewards", "logps") for side, number in sides.items()}

    def compute_means(self, sums: RowSums) -> dict[str, float]:
        """Return the metrics that these sums of all ranks tell; those of a side without rows are left out."""
        means = super().compute_means(sums)
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return {name: mean for name, mean in means.items() if name == "loss" or not math.isnan(mean)}


@dataclass(frozen=True)
class JudgedCollator:
    """Makes a batch out of rows of KTO: one of their answers, and within it one of mismatched answers."""

    collate: Collator  # of answers
    has_mismatched: bool  # whether these are asked for

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the answers, with what is desirable among them, and the batch of mismatched ones."""
        kept = keep_trained(examples)
        batch = self.collate(kept)
        batch[DESIRABLE] = torch.tensor([example["desirable"] for example in kept])
        if self.has_mismatched:
            batch[MISMATCHED] = self.collate([take_mismatched(example) for example in kept])
        return batch


def take_mismatched(example: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an answer to another prompt: its own prompt with that answer."""
    ids = example["other_ids"]
    return {"input_ids": ids, "labels": example["other_labels"], "seq_lengths": [len(ids)], "row": example["row"]}


def describe_judged(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a batch's padded answers as TRL asks for them."""
    described: dict[str, torch.Tensor] = batch[ANSWERS].describe()
    if MISMATCHED in batch:
        described |= {f"KL_{name}": value for name, value in batch[MISMATCHED][ANSWERS].describe().items()}
    return described


KTO = TrainingMethod(
    name="kto",
    trainer_class=ResumableKTOTrainer,
    config_class=KTOConfig,
    fixed_arguments={"max_length": None},
    learning_rate=1e-6,
    columns=ResumableKTOTrainer.columns,
    metric_names=RENAMED,
    hidden_metrics=TRAINER_METRICS,
)
