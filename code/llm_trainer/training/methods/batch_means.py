# SPDX-License-Identifier: Apache-2.0
"""Metrics of trainers whose batches give means over their rows: means over all rows, in whatever batches they came.

TRL takes means of batches' means, and gathers each of them from all ranks. Here the ranks talk once a line.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput


@dataclass(frozen=True)
class RowSums:
    """The sums over rows of metrics that are means of a batch, and the tokens that were read."""

    num_rows: int = 0
    num_tokens: int = 0
    totals: tuple[tuple[str, float], ...] = ()  # metric -> sum over the rows

    def add_batch(self, num_rows: int, num_tokens: int, means: dict[str, float]) -> "RowSums":
        """Return the sums with those of a batch, whose metrics are means over its rows."""
        return self + RowSums(num_rows, num_tokens, tuple((name, mean * num_rows) for name, mean in means.items()))

    def __add__(self, other: "RowSums") -> "RowSums":
        """Return the sums over both."""
        totals = dict(self.totals)
        for name, total in other.totals:
            totals[name] = totals.get(name, 0.0) + total
        return RowSums(self.num_rows + other.num_rows, self.num_tokens + other.num_tokens, tuple(totals.items()))

    def gather(self, accelerator: Accelerator, names: tuple[str, ...]) -> "RowSums":
        """Return the sums of all ranks for the metrics of these names. Every rank must call this."""
        own = dict(self.totals)
        values = [self.num_rows, self.num_tokens, *(own.get(name, 0.0) for name in names)]
        sums = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()
        return RowSums(int(sums[0]), int(sums[1]), tuple(zip(names, sums[2:], strict=True)))

    @property
    def means(self) -> dict[str, float]:
        """The means of the metrics over the rows, nan without any."""
        return {name: total / self.num_rows if self.num_rows else float("nan") for name, total in self.totals}


class BatchMeans(Trainer):
    """A trainer of TRL whose metrics are means over rows. It goes before TRL's trainer among the bases."""

    metric_names: tuple[str, ...]  # of those that TRL takes of a batch, and the loss
    aux_loss_enabled: bool = False
    _metrics: Any
    _total_train_tokens: int
    num_tokens: int

    def begin_sums(self) -> None:
        """Sum up from here, and have TRL take the values of this rank alone."""
        self.accelerator.gather = self.accelerator.gather_for_metrics = return_own
        self.line_sums = RowSums()  # since the last line of the training
        self.run_sums = RowSums()  # up to the last line
        self.eval_sums = RowSums()

    def count_batch(self, num_rows: int, num_tokens: int, loss: torch.Tensor) -> None:
        """Add the metrics that TRL has taken of a batch to the sums, and take them out of TRL's lists."""
        is_training = self.model.training
        found = self._metrics["train" if is_training else "eval"]
        means = {name: found[name][-1] for name in self.metric_names if name in found} | {"loss": loss.item()}
        found.clear()
        if is_training:
            self.line_sums = self.line_sums.add_batch(num_rows, num_tokens, means)
        else:
            self.eval_sums = self.eval_sums.add_batch(num_rows, num_tokens, means)

    def gather_sums(self, sums: RowSums) -> RowSums:
        """Return the sums of all ranks. Every rank must call this."""
        names = (name for name in self.metric_names if self.aux_loss_enabled or name != "aux_loss")
        return sums.gather(self.accelerator, tuple(names))

    def count_tokens(self) -> int:
        """Return the tokens trained on so far, also since the last line. Every rank must call this."""
        return self.num_tokens + self.gather_sums(self.line_sums).num_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. A line of the training gets its means over all rows since the last one, and the totals the run's."""
        metrics = self._metrics["train"]
        if "loss" in logs:
            since = self.gather_sums(self.line_sums)
            self.run_sums, self.line_sums = self.run_sums + since, RowSums()
            self._total_train_tokens += since.num_tokens
            logs["loss"] = since.means["loss"]
            metrics.update({name: [mean] for name, mean in since.means.items() if name != "loss"})
            metrics["num_tokens"] = [self._total_train_tokens]
        elif "train_loss" in logs:
            whole = self.run_sums + self.gather_sums(self.line_sums)
            if whole.num_rows:
                logs["train_loss"] = whole.means["loss"]
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Sum up over the rows of a batch. Return no loss, which Transformers would gather from all ranks."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. The metrics are means over all rows, and the ranks add up their sums once."""
        self.eval_sums = RowSums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.gather_sums(self.eval_sums).means
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**metrics, **output.metrics}, num_samples=len(self.eval_dataset))


def return_own(values: Any) -> Any:
    """Return the values of this rank, in the place of Accelerate's `gather`: a line gathers the sums."""
    return values
