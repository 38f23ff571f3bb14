# SPDX-License-Identifier: Apache-2.0
"""The sentence that people and SageMaker see first is the cause."""

import pytest

from llm_trainer.common.errors import (
    MAX_FAILURE_CHARACTERS,
    MAX_LISTED_PROBLEMS,
    MAX_QUOTED_CHARACTERS,
    RESERVED_BYTES,
    Failure,
    UserError,
    choose_cause,
    quote_error,
    read_failures,
    report_failure,
    reserve_failure,
    write_failure,
)


def test_the_cause_is_the_first_failure_that_is_no_echo():
    peer, lost = Failure("peer", "peer", 1), Failure("lost", "lost", 2)
    fault, mistake = Failure("fault", "fault", 4), Failure("mistake", "mistake", 3)
    assert choose_cause([peer, lost, fault, mistake]) is mistake
    assert choose_cause([peer, lost]) is lost
    assert choose_cause([]) is None


def test_many_problems_are_listed_below_the_first():
    assert str(UserError("only one")) == "only one"
    text = str(UserError(*(f"problem {number}" for number in range(MAX_LISTED_PROBLEMS + 3))))
    first, *listed = text.splitlines()
    assert first == f"problem 0 ({MAX_LISTED_PROBLEMS + 3} problems in all, the others below.)"
    assert len(listed) == MAX_LISTED_PROBLEMS
    assert listed[-1] == "- and 3 more."


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("first line.\nsecond line", "first line"),
        ("", "ValueError"),
        ("Original Traceback (most recent call last):\n  File\nKeyError: 'a'", "KeyError: 'a'"),
        ("x" * 500, "x" * MAX_QUOTED_CHARACTERS + "..."),
    ],
)
def test_an_error_is_summed_up_in_the_line_that_says_what_happened(text, summary):
    assert quote_error(ValueError(text)) == summary


def test_a_failure_is_left_in_the_space_that_was_reserved_for_it(tmp_path):
    reserve_failure(tmp_path, "rank-0")
    assert (tmp_path / ".rank-0").stat().st_size == RESERVED_BYTES
    failure = Failure("Rank 0 broke.", "fault", 12.5)
    report_failure(tmp_path, "rank-0", failure)
    assert read_failures(tmp_path) == [failure]
    assert [file.name for file in tmp_path.iterdir()] == ["rank-0.json"]


def test_the_first_failure_file_stays(tmp_path):
    write_failure(tmp_path / "output", "é" * 2000)
    write_failure(tmp_path / "output", "a later one")
    assert (tmp_path / "output/failure").read_text(encoding="utf-8") == "é" * MAX_FAILURE_CHARACTERS
    assert [file.name for file in (tmp_path / "output").iterdir()] == ["failure"]


def test_a_failure_that_utf_8_cannot_hold_is_written_with_escapes(tmp_path):
    write_failure(tmp_path, "file \udcff\0 is broken")
    assert (tmp_path / "failure").read_text(encoding="utf-8") == r"file \udcff\x00 is broken"
