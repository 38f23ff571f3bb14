# SPDX-License-Identifier: Apache-2.0
"""The description of a training method, by which all other code tells methods apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_trainer.training.resumable import ResumableMixin

# Metrics of Transformers' trainer that no line shows: a total, and what include_num_input_tokens_seen adds to lines
# that have it all already.
TRAINER_METRICS = ("total_flos", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second")


def choose_no_defaults(given: Mapping[str, Any], num_devices: int) -> dict[str, Any]:
    """Return no arguments: those of TRL's config are right for the method."""
    return {}


@dataclass(frozen=True)
class TrainingMethod:
    """A way to train: which trainer it is, which rows it takes, and what it logs."""

    name: str
    trainer_class: type[ResumableMixin]
    config_class: type[Any]  # of the trainer's arguments, a subclass of Transformers' TrainingArguments
    fixed_arguments: Mapping[str, Any]  # arguments that no user sets, since rows are tokenized and cut already
    learning_rate: float  # the default for all weights
    columns: tuple[str, ...]  # of a tokenized row, without those that only samplers read
    metric_names: Mapping[str, str]  # the trainer's names -> those of common/metric_definitions.py, where they differ
    hidden_metrics: tuple[str, ...]  # the trainer's metrics that no line and no tracker shows
    best_metric: str = "eval_loss"  # by which the best weights are told
    # Takes the settings that the user gave and the number of devices, and returns arguments by their names.
    choose_defaults: Callable[[Mapping[str, Any], int], dict[str, Any]] = choose_no_defaults
