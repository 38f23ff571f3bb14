# SPDX-License-Identifier: Apache-2.0
"""All completions of a batch end where a stop is wanted, and only within the context."""

import torch

from llm_trainer.training.generation.stops import EndsEarly, ending_early, has_any


class Model:
    def generate(self, stopping_criteria=None):
        return stopping_criteria


def test_all_completions_end_from_the_wish_on():
    wishes = iter([False, True])
    criterion = EndsEarly(lambda: next(wishes))
    ids = torch.zeros(3, 2)
    assert [criterion(ids, None).tolist() for _ in range(3)] == [[False] * 3, [True] * 3, [True] * 3]


def test_a_model_has_the_criterion_within_the_context_alone():
    model, criterion = Model(), EndsEarly(lambda: False)
    with ending_early(model, criterion):
        assert [*model.generate()] == [criterion]
    assert model.generate() is None


def test_one_rank_asks_nobody():
    assert has_any(True, None)
    assert not has_any(False, None)
