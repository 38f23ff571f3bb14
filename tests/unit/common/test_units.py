# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.common import units


def test_counts_shares_and_numbers_are_short():
    assert [units.show_count(number) for number in (0, 999, 1234567)] == ["0", "999", "1,234,567"]
    assert [units.show_share(share) for share in (0.0834, 0.424, 1)] == ["8.3%", "42%", "100%"]
    assert [units.show_number(number) for number in (0.123456, 999.94, 1000, -12345.6)] == [
        "0.1235",
        "999.9",
        "1,000",
        "-12,346",
    ]
    assert [units.show_large(number) for number in (950, 43_646_976, 8.19e9, 1.5e13)] == [
        "950",
        "43.6 M",
        "8.19 B",
        "15 T",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (75, "1 min 15 s"), (7200, "2 h"), (90_061, "1 d 1 h"), (59.7, "1 min")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert units.show_duration(seconds) == text


def test_all_hosts_are_billed():
    assert units.count_instance_hours(3, 1000.0, 1000.0 + 7200) == 6


@pytest.mark.parametrize(
    ("size", "text"), [(64 * units.MIB, "64 MiB"), (80 * units.GIB, "80 GiB"), (9.6 * units.GIB, "9.6 GiB")]
)
def test_sizes_are_short(size, text):
    assert units.show_bytes(size) == text
