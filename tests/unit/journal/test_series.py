# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest

from llm_trainer.journal.series import Series


def test_few_points_stay_as_they_are():
    series = Series(limit=10)
    for x in range(10):
        series.add(x, x * x)
    assert [(bucket.x, bucket.low, bucket.mean, bucket.high) for bucket in series.buckets] == [
        (x, x * x, x * x, x * x) for x in range(10)
    ]


@pytest.mark.parametrize("num_points", [11, 999, 10_000])
def test_many_points_are_thinned_and_no_extreme_or_sum_is_lost(num_points):
    dice = random.Random(3)
    points = [(x, dice.gauss(0, 1)) for x in range(num_points)]
    series = Series(limit=10)
    for x, y in points:
        series.add(x, y)
    values = [y for _, y in points]
    assert 5 <= len(series.buckets) <= 10
    assert (series.low, series.high, series.count, series.last) == (min(values), max(values), num_points, values[-1])
    assert series.mean == pytest.approx(sum(values) / num_points)
    assert [bucket.x for bucket in series.buckets] == sorted(bucket.x for bucket in series.buckets)


def test_a_spike_stays_in_the_bucket_of_its_place():
    series = Series(limit=10)
    for x in range(1000):
        series.add(x, 100 if x == 730 else 0)
    spiked = [bucket for bucket in series.buckets if bucket.high == 100]
    assert len(spiked) == 1
    assert abs(spiked[0].x - 730) <= spiked[0].points


def test_what_is_no_number_is_noted_and_left_out():
    series = Series()
    for x, y in enumerate([1.0, math.nan, math.inf, 2.0]):
        series.add(x, y)
    assert series.not_finite_at == [1, 2]
    assert (series.count, series.high, series.last) == (2, 2.0, 2.0)


def test_an_attempt_that_begins_again_replaces_what_lay_behind():
    series = Series()
    for x in range(6):
        series.add(x, 10)
    series.drop_from(4)
    assert ([bucket.x for bucket in series.buckets], series.last) == ([0, 1, 2, 3], 10)
    series.drop_from(0)
    assert (bool(series), series.last) == (False, None)


def test_the_smoothed_curve_neither_lags_nor_leaves_the_values():
    series = Series()
    for x in range(500):
        series.add(x, 500 - x)
    assert series.smooth()[100:400] == pytest.approx([500 - x for x in range(100, 400)])
    assert max(series.smooth()) <= 500


def test_a_part_of_a_series_and_the_same_in_another_unit():
    series = Series()
    for x in range(10):
        series.add(x, 1000 * x)
    part = series.cut_out(3, 5).scale(1 / 1000)
    assert [(bucket.x, bucket.mean) for bucket in part.buckets] == [(3, 3), (4, 4), (5, 5)]
