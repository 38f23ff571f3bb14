# SPDX-License-Identifier: Apache-2.0
"""Means are over rows, however many of them each batch had."""

import math

from accelerate import Accelerator

from llm_trainer.training.batches.batch_means import RowSums


def test_a_batch_counts_by_its_rows():
    sums = RowSums().add_batch(3, 30, {"loss": 1.0, "margin": 4.0}).add_batch(1, 5, {"loss": 5.0, "margin": 0.0})
    assert sums.means == {"loss": 2.0, "margin": 3.0}
    assert (sums.num_rows, sums.num_tokens) == (4, 35)


def test_a_batch_that_only_fills_the_ranks_counts_nothing():
    sums = RowSums().add_batch(2, 9, {"loss": 1.0})
    assert sums.add_batch(0, 0, {"loss": 7.0}).means == {"loss": 1.0}


def test_sums_add_up_and_without_rows_there_is_no_mean():
    first, second = RowSums().add_batch(1, 2, {"loss": 1.0}), RowSums().add_batch(3, 4, {"loss": 5.0, "aux_loss": 1.0})
    assert (first + second).means == {"loss": 4.0, "aux_loss": 0.75}
    assert math.isnan(RowSums(totals=(("loss", 0.0),)).means["loss"])


def test_gathered_sums_have_the_asked_metrics():
    gathered = RowSums().add_batch(2, 9, {"loss": 1.5}).gather(Accelerator(cpu=True), ("loss", "margin"))
    assert gathered.means == {"loss": 1.5, "margin": 0.0}
    assert (gathered.num_rows, gathered.num_tokens) == (2, 9)


def test_a_metric_may_be_a_mean_over_some_rows_of_a_batch():
    sums = (
        RowSums().add_batch(4, 9, {"loss": 1.0, "some": 6.0}, {"some": 1}).add_batch(4, 9, {"loss": 3.0}, {"some": 0})
    )
    sums += RowSums().add_batch(2, 9, {"loss": 2.0, "some": 0.0}, {"some": 2})
    assert sums.means == {"loss": 2.0, "some": 2.0}
    assert sums.gather(Accelerator(cpu=True), ("loss", "some")).means == sums.means
