# SPDX-License-Identifier: Apache-2.0
import torch
from torch.utils.data import RandomSampler

from llm_trainer.training.filled_order import FilledOrder


def order_of(num_rows):
    return list(FilledOrder(RandomSampler(range(7), generator=torch.Generator().manual_seed(5)), 7, num_rows))


def test_the_order_of_rows_is_the_same_however_many_fill_the_last_batch():
    assert sorted(order_of(7)) == list(range(7)) != order_of(7)
    assert order_of(9) == [*order_of(7), 7, 8]
    assert len(FilledOrder(range(7), 7, 9)) == 9
