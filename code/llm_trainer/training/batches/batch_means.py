# SPDX-License-Identifier: Apache-2.0
"""Metrics of trainers whose batches give means over their rows: means over all rows, in whatever batches they came.

TRL takes means of batches' means, and gathers each of them from all ranks. Here the ranks talk once a line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

NO_COUNTS: Mapping[str, int] = MappingProxyType({})

Values = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class RowSums:
    """The sums over rows of metrics that are means of a batch, and the tokens that were read."""

    num_rows: int = 0
    num_tokens: int = 0
    totals: tuple[tuple[str, float], ...] = ()  # metric -> sum over its rows
    counts: tuple[tuple[str, int], ...] = ()  # metric -> its rows, where these are not all

    def add_batch(
        self, num_rows: int, num_tokens: int, means: dict[str, float], counts: Mapping[str, int] = NO_COUNTS
    ) -> "RowSums":
        """Return the sums with those of a batch. `counts` names the metrics that are means over fewer of its rows."""
        totals = tuple((name, mean * counts.get(name, num_rows)) for name, mean in means.items())
        return self + RowSums(num_rows, num_tokens, totals, tuple(counts.items()))

    def __add__(self, other: "RowSums") -> "RowSums":
        """Return the sums over both."""
        totals, counts = add_values(self.totals, other.totals), add_values(self.counts, other.counts)
        return RowSums(self.num_rows + other.num_rows, self.num_tokens + other.num_tokens, totals, counts)

    def gather(self, accelerator: Accelerator, names: tuple[str, ...]) -> "RowSums":
        """Return the sums of all ranks for the metrics of these names. Every rank must call this."""
        totals, counts = dict(self.totals), dict(self.counts)
        values = [totals.get(name, 0.0) for name in names] + [counts.get(name, self.num_rows) for name in names]
        values += [self.num_rows, self.num_tokens]
        sums = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()
        found = zip(names, sums, strict=False), zip(names, map(int, sums[len(names) :]), strict=False)
        return RowSums(int(sums[-2]), int(sums[-1]), *map(tuple, found))

    @property
    def means(self) -> dict[str, float]:
        """The means of the metrics over their rows, nan without any."""
        counts = dict(self.counts)
        rows = {name: counts.get(name, self.num_rows) for name, _ in self.totals}
        return {name: total / rows[name] if rows[name] else math.nan for name, total in self.totals}


def add_values(first: Values, second: Values) -> Values:
    """Return the sum of each name's values."""
    values = dict(first)
    for name, value in second:
        values[name] = values.get(name, 0) + value
    return tuple(values.items())


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

    def count_batch(
        self, num_rows: int, num_tokens: int, loss: torch.Tensor, counts: Mapping[str, int] = NO_COUNTS
    ) -> None:
        """Add the metrics that TRL has taken of a batch to the sums, and take them out of TRL's lists."""
        is_training = self.model.training
        found = self._metrics["train" if is_training else "eval"]
        means = {name: found[name][-1] for name in self.metric_names if name in found} | {"loss": loss.item()}
        found.clear()
        if is_training:
            self.line_sums = self.line_sums.add_batch(num_rows, num_tokens, means, counts)
        else:
            self.eval_sums = self.eval_sums.add_batch(num_rows, num_tokens, means, counts)

    def gather_sums(self, sums: RowSums) -> RowSums:
        """Return the sums of all ranks. Every rank must call this."""
        names = (name for name in self.metric_names if self.aux_loss_enabled or name != "aux_loss")
        return sums.gather(self.accelerator, tuple(names))

    def compute_means(self, sums: RowSums) -> dict[str, float]:
        """Return the metrics that these sums of all ranks tell."""
        return sums.means

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
            means = self.compute_means(since)
            logs["loss"] = means.pop("loss")
            metrics.update({name: [mean] for name, mean in means.items()})
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
        means = self.compute_means(self.gather_sums(self.eval_sums))
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**metrics, **output.metrics}, num_samples=len(self.eval_dataset))


def return_own(values: Any) -> Any:
    """Return the values of this rank, in the place of Accelerate's `gather`: a line gathers the sums."""
    return values
