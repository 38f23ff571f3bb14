# SPDX-License-Identifier: Apache-2.0
"""Evaluations by completions: each prompt counts once, in whatever batches and on however many ranks."""

import math
from typing import Any

import torch
from datasets import Dataset

from llm_trainer.training.batches.whole_batches import fill_up
from llm_trainer.training.generation.prompts import FILLS, TOKENS
from llm_trainer.training.resumable import ResumableMixin


class WholeEvaluations(ResumableMixin):
    """A trainer of completions whose evaluations are means over all of them. It goes before TRL's trainer.

    Accelerate would fill the last batch with the first prompts, and TRL takes means of batches.
    """

    num_generations_eval: int
    reward_func_names: list[str]
    reward_weights: torch.Tensor
    eos_token_ids: list[int]
    _tokenizer: Any
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of TRL's trainer."""
        super().__init__(*args, **kwargs)
        self.counts: list[bool] = []  # whether each completion of the batch counts
        self.judged: list[torch.Tensor] = []  # of each batch: rewards by function, nan where a completion counts not
        self.written: list[torch.Tensor] = []  # of each batch: tokens, whether they were cut, whether they count

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation, filled with prompts that count for nothing."""
        self.judged, self.written = [], []  # an evaluation that a stop broke off may have left some
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1 or self.args.dataloader_drop_last:
            rows = fill_prompts(rows, self.args.eval_batch_size * self.args.world_size // self.num_generations_eval)
        return super().get_eval_dataloader(rows)

    def take_out_marks(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows as rewards get them, and note which of them count."""
        self.counts = [not row[FILLS] for row in inputs]
        return [{name: value for name, value in row.items() if name not in (TOKENS, FILLS)} for row in inputs]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: list[list[int]]) -> Any:
        """Return the rewards of all ranks' completions. Those of an evaluation are kept, and nan where none counts."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        if not self.model.training:
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            own = zip(completion_ids, self.counts, strict=True)
            rows = [[len(ids), ids[-1] not in ends, counts] for ids, counts in own]
            written = self.accelerator.gather(torch.tensor(rows, dtype=torch.float32, device=rewards.device))
            rewards[written[:, 2] == 0] = math.nan
            self.judged.append(rewards)
            self.written.append(written)
        return rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. A line of an evaluation has means over its completions."""
        if self.judged and not self.model.training:
            judged, written = torch.cat(self.judged), torch.cat(self.written)
            self._metrics["eval"].update({name: [value] for name, value in self.summarize(judged, written).items()})
            self.judged, self.written = [], []
        super().log(logs, start_time)

    def summarize(self, judged: torch.Tensor, written: torch.Tensor) -> dict[str, float]:
        """Return the metrics of an evaluation with these rewards and completions, each of them in its row."""
        is_counted = written[:, 2] == 1
        totals = (judged * self.reward_weights.to(judged.device)).nansum(dim=1)
        totals[judged.isnan().all(dim=1)] = math.nan
        known = totals[~totals.isnan()]
        groups = totals[is_counted].view(-1, self.num_generations_eval)
        is_equal = groups.nan_to_num(math.inf).amin(dim=1) == groups.nan_to_num(-math.inf).amax(dim=1)
        lengths, is_cut = written[is_counted, :2].unbind(dim=1)
        means = dict(zip(self.reward_func_names, judged.nanmean(dim=0).tolist(), strict=True))
        return {
            **{f"rewards/{name}/mean": mean for name, mean in means.items()},
            "reward": known.mean().item(),
            "reward_std": known.std().item() if len(known) > 1 else 0.0,
            "frac_reward_zero_std": is_equal.float().mean().item(),
            "completions/mean_length": lengths.mean().item(),
            "completions/clipped_ratio": is_cut.mean().item(),
        }


def fill_prompts(rows: Dataset, num_prompts: int) -> Dataset:
    """Return the rows, and after them the first one as often as fills the last batch of `num_prompts` prompts.

    It has the length 0 then, by which it is told.
    """
    return fill_up(rows, num_prompts, {**rows[0], "length": 0})
