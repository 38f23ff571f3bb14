# SPDX-License-Identifier: Apache-2.0
"""A stop while the model writes, which may take longer than the platform waits for the end of a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import StoppingCriteria, StoppingCriteriaList

from llm_trainer.training.resume import make_gather


class GenerationStop(Exception):  # noqa: N818 - it is not an error
    """A stop was agreed on while the model wrote. The step counts for nothing."""


class EndsEarly(StoppingCriteria):
    """A criterion that ends all completions of a batch once a stop is wanted."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        """Ask `is_wanted` after each token."""
        self.is_wanted = is_wanted
        self.has_ended = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return for each completion whether it ends."""
        self.has_ended = self.has_ended or self.is_wanted()
        return torch.full((len(input_ids),), self.has_ended, device=input_ids.device)


@contextmanager
def ending_early(model: Any, criterion: EndsEarly) -> Iterator[None]:
    """Have the model write no further in this context than the criterion says. TRL hands on no criteria."""
    outer = vars(model).get("generate")
    model.generate = partial(model.generate, stopping_criteria=StoppingCriteriaList([criterion]))
    try:
        yield
    finally:
        del model.generate
        if outer is not None:
            model.generate = outer


def has_any(own: bool, group: dist.ProcessGroup | None) -> bool:
    """Tell whether something is so on any rank. Every rank must call this."""
    return any(make_gather(group)(own))
