# SPDX-License-Identifier: Apache-2.0
"""Counts of rows: added up, kept as JSON, and judged."""

import json
from collections import Counter

import pytest

from llm_trainer.common.errors import MAX_LISTED_PROBLEMS
from llm_trainer.data.report import DataReport


def test_reports_add_up():
    first = DataReport(files=[{"name": "a"}], formats={"a": "text"}, num_rows=2, num_tokens=8, lengths=Counter({4: 2}))
    second = DataReport(files=[{"name": "b"}], formats={"b": "text"}, num_rows=1, num_tokens=5, lengths=Counter({4: 1}))
    first.add_report(second)
    assert [file["name"] for file in first.files] == ["a", "b"]
    assert first.formats == {"a": "text", "b": "text"}
    assert (first.num_rows, first.num_tokens, first.lengths) == (3, 13, {4: 3})


def test_only_the_first_bad_rows_are_listed_and_all_are_counted():
    whole = DataReport()
    for part in range(3):
        report = DataReport()
        for number in range(MAX_LISTED_PROBLEMS):
            report.note_bad_row(f"{part} {number}")
        report.note_bad_row("one more")
        whole.add_report(report)
    assert whole.num_bad_rows == 3 * (MAX_LISTED_PROBLEMS + 1)
    assert whole.bad_rows == [f"0 {number}" for number in range(MAX_LISTED_PROBLEMS)]


def test_a_report_survives_json():
    report = DataReport(num_rows=3, lengths=Counter({4: 2, 17: 1}), bad_rows=["a"])
    assert DataReport.from_json(json.loads(json.dumps(vars(report)))) == report


def test_percentiles_are_lengths_of_rows():
    report = DataReport(lengths=Counter(dict.fromkeys(range(1, 101), 1)))
    assert report.length_percentiles() == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "longest": 100}
    assert DataReport().length_percentiles()["longest"] == 0


def test_the_summary_leaves_out_what_is_long():
    summary = DataReport(num_tokens=8, num_supervised_tokens=2, lengths=Counter({8: 1}), bad_rows=["a"]).summary()
    assert not summary.keys() & {"lengths", "bad_rows", "damage"}
    assert (summary["supervised_share"], summary["longest_row_tokens"]) == (0.25, 8)


@pytest.mark.parametrize(("fraction", "num_sentences"), [(0, 1), (0.09, 2), (0.1, 0)])
def test_bad_rows_are_told_unless_that_many_are_allowed(fraction, num_sentences):
    report = DataReport(num_bad_rows=1, bad_rows=["a.jsonl row 1 is bad."], lengths=Counter({4: 9}))
    assert len(list(report.find_bad_rows("train", fraction))) == num_sentences
    report.damage = ["a.jsonl was cut off."]
    assert len(list(report.find_bad_rows("train", fraction))) == num_sentences + 1


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({}, "The train data has no rows (no file was read): put rows there."),
        ({"num_dropped_rows": 2}, "The train data has no rows left (2 were longer than max_length)"),
        (
            {"num_dropped_rows": 2, "most_image_tokens": 5000},
            "The train data has no rows left (2 were longer than max_length, and the images of one take up to 5,000 "
            "tokens, which image_processor_options can lower): raise",
        ),
        ({"num_rows": 2}, "No token of the train data is trained on"),
        ({"num_rows": 2, "num_supervised_tokens": 2, "num_missed_stops": 1}, "1 of 2 rows of the train data train on"),
        ({"num_rows": 2, "num_supervised_tokens": 2}, "No row of the train data trains the end-of-sequence token"),
        ({"num_rows": 2, "num_supervised_tokens": 2, "num_truncated_rows": 2}, None),
        ({"num_rows": 2, "num_supervised_tokens": 2, "num_supervised_eos": 1}, None),
    ],
)
def test_what_would_teach_nothing_or_the_wrong_thing_is_told(counts, sentence):
    flaws = list(DataReport(lengths=Counter({4: 2} if counts else {}), **counts).find_flaws("train"))
    assert [flaw.startswith(sentence) for flaw in flaws] == ([True] if sentence else [])


def test_pairs_are_rows_of_two_sequences():
    report = DataReport(sequences_a_row=2, num_bad_rows=1, bad_rows=["a"], num_equal_pairs=1, num_rows=2)
    report.lengths = Counter({4: 5, 9: 1})
    report.chosen_lengths, report.rejected_lengths = Counter({1: 3}), Counter({2: 3})
    assert "1 bad rows among 4" in list(report.find_bad_rows("train", 0.1))[1]
    assert str(report).startswith("2 pairs, 0 tokens (0.0% trained on), longest sequence 9 tokens, 0 pairs cut, 1 left")
    percentiles = {"p50": 2, "p90": 2, "p95": 2, "p99": 2, "longest": 2}
    pairs = report.summary()["pairs"]
    assert pairs["rejected_tokens"] == {"mean": 2.0, **percentiles}
    assert (pairs["sequences_a_row"], pairs["equal"], pairs["swapped"], pairs["cut_answers"]) == (2, 1, 0, 0)
    assert "pairs" not in DataReport().summary()
    assert DataReport.from_json(json.loads(json.dumps(vars(report)))) == report


def test_reports_of_pairs_add_up():
    report = DataReport(sequences_a_row=2)
    for length in (3, 4):
        own = {"chosen_lengths": Counter([length]), "rejected_lengths": Counter([1])}
        report.add_report(DataReport(lengths=Counter([length, 1]), num_swapped_pairs=1, **own))
    assert (report.sequences_a_row, report.num_swapped_pairs) == (2, 2)
    assert (report.chosen_lengths, report.rejected_lengths) == (Counter([3, 4]), Counter([1, 1]))


def test_pairs_that_are_all_equal_leave_nothing_to_learn():
    report = DataReport(sequences_a_row=2, lengths=Counter({4: 6}), num_equal_pairs=3)
    assert list(report.find_flaws("train")) == [
        "The train data has no pairs left (3 have the same chosen and rejected answer within max_length): give pairs "
        "of two answers, and raise max_length where these begin alike."
    ]


@pytest.mark.parametrize(("num_desirable", "word"), [(3, "desirable"), (0, "undesirable")])
def test_answers_that_are_all_of_one_kind_are_a_flaw(num_desirable, word):
    sides = {"chosen_lengths" if num_desirable else "rejected_lengths": Counter({2: 3})}
    counts = {"num_rows": 3, "num_supervised_tokens": 6, "num_supervised_eos": 3, "lengths": Counter({4: 3})}
    report = DataReport(num_desirable_rows=num_desirable, **counts, **sides)
    (flaw,) = report.find_flaws("train")
    assert flaw.startswith(f"All 3 rows of the train data are {word}, so there is nothing to compare")
    report.num_desirable_rows = 1
    assert list(report.find_flaws("train")) == []
    assert report.summary()["judged"]["desirable_share"] == 0.3333


def test_several_reports_have_the_largest_number_of_images_of_a_row():
    report = DataReport(most_images_a_row=2)
    for most in (3, 1):
        report.add_report(DataReport(most_images_a_row=most))
    assert report.most_images_a_row == 3
