# SPDX-License-Identifier: Apache-2.0
"""Rows and pairs are cut to max_length, left out where that leaves nothing to learn, and counted."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import EncodedRow, Encoder, PlacedPicture, Vocabulary
from llm_trainer.data.fitting import Fitter
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.report import DataReport
from support.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER, frozenset({TOKENIZER.eos_token_id}), len(TOKENIZER))


def build_fitter(row_format="pretokenized", **settings):
    chosen = Settings(**settings).data
    return Fitter(Encoder(VOCABULARY, chosen, row_format), chosen)


@pytest.mark.parametrize(
    ("settings", "ids", "labels", "counts"),
    [
        ({}, [5, 6, 7, 2], [IGNORED, 6, 7, 2], (1, 4, 3, 1, 0)),
        ({"max_length": 2}, [5, 6], [IGNORED, 6], (1, 2, 1, 0, 1)),
        ({"max_length": 2, "truncation_mode": "keep_end"}, [7, 2], [7, 2], (1, 2, 1, 1, 1)),
    ],
)
def test_a_row_is_cut_at_one_end_and_counted_as_it_is_trained_on(settings, ids, labels, counts):
    row = EncodedRow(np.array([5, 6, 7, 2], np.int32), np.array([IGNORED, 6, 7, 2], np.int32))
    report = DataReport()
    (fitted,) = build_fitter(**settings).fit_row((row,), report)
    assert (fitted.input_ids.tolist(), fitted.labels.tolist()) == (ids, labels)
    assert counts == (
        *(report.num_rows, report.num_tokens, report.num_supervised_tokens),
        *(report.num_supervised_eos, report.num_truncated_rows),
    )
    assert report.lengths == {4: 1}


def test_a_row_that_is_left_out_is_counted_by_its_reason():
    row = EncodedRow(np.array([5, 6, 7, 2], np.int32), np.array([IGNORED, IGNORED, 7, 2], np.int32))
    report = DataReport()
    assert build_fitter(max_length=2).fit_row((row,), report) is None
    assert build_fitter(max_length=2, apply_truncation=False).fit_row((row,), report) is None
    assert (report.num_unsupervised_rows, report.num_dropped_rows, report.num_rows) == (1, 1, 0)


def build_side(num_prompt, *answer):
    ids = np.array([5] * num_prompt + list(answer), np.int32)
    labels = ids.copy()
    labels[:num_prompt] = IGNORED
    return EncodedRow(ids, labels)


def fit_pair(chosen, rejected, **settings):
    """Return the fitted pair, and the report."""
    report = DataReport(sequences_a_row=2)
    return build_fitter("preference", method="dpo", **settings).fit_row((chosen, rejected), report), report


def test_a_pair_is_one_row_of_two_lengths():
    pair, report = fit_pair(build_side(2, 6, 7, 2), build_side(2, 8, 2))
    assert [side.input_ids.tolist() for side in pair] == [[5, 5, 6, 7, 2], [5, 5, 8, 2]]
    assert (report.num_rows, report.num_tokens, report.num_supervised_tokens) == (1, 9, 5)
    assert (report.lengths, report.chosen_lengths, report.rejected_lengths) == ({5: 1, 4: 1}, {3: 1}, {2: 1})
    assert (report.num_supervised_eos, report.num_truncated_rows, report.num_cut_answers) == (1, 0, 0)


@pytest.mark.parametrize(
    ("mode", "kept", "num_cut_answers"),
    [("keep_start", [[5, 5, 6, 7], [5, 5, 8, 2]], 1), ("keep_end", [[5, 6, 7, 2], [5, 5, 8, 2]], 0)],
)
def test_each_side_is_cut_to_max_length_and_cut_answers_are_counted(mode, kept, num_cut_answers):
    pair, report = fit_pair(build_side(2, 6, 7, 2), build_side(2, 8, 2), max_length=4, truncation_mode=mode)
    assert [side.input_ids.tolist() for side in pair] == kept
    assert (report.num_truncated_rows, report.num_cut_answers) == (1, num_cut_answers)


def test_a_pair_of_which_one_side_does_not_fit_is_left_out_whole():
    long, short = build_side(3, 6, 7, 2), build_side(1, 2)
    pair, report = fit_pair(long, short, max_length=3)
    assert (pair, report.num_unsupervised_rows, report.num_rows) == (None, 1, 0)
    pair, report = fit_pair(long, short, max_length=3, apply_truncation=False)
    assert (pair, report.num_dropped_rows, report.lengths.total()) == (None, 1, 2)


def test_equal_sides_are_left_out_also_where_the_cut_makes_them_so():
    pair, report = fit_pair(build_side(2, 6, 2), build_side(2, 6, 2))
    assert (pair, report.num_equal_pairs, report.num_left_out) == (None, 1, 1)
    pair, report = fit_pair(build_side(2, 6, 7, 2), build_side(2, 6, 8, 2), max_length=3)
    assert (pair, report.num_equal_pairs) == (None, 1)


def test_a_stop_that_begins_the_second_side_is_not_the_first_ones():
    bos = TOKENIZER.eos_token_id
    sides = [EncodedRow(np.array([bos, 9, 6], np.int32), np.array([IGNORED, IGNORED, 6], np.int32)) for _ in range(2)]
    sides[1].input_ids[1] = 8
    _, report = fit_pair(*sides)
    assert (report.num_rows, report.num_missed_stops) == (1, 0)


PICTURED = EncodedRow(
    np.arange(20, dtype=np.int32),
    np.where(np.isin(np.arange(20), [1, 2, 7, 8, 19]), np.arange(20), IGNORED).astype(np.int32),
    pictures=tuple(PlacedPicture(f"{start}.png", 0, 0, b"", "", start, 4) for start in (3, 12)),
)


@pytest.mark.parametrize(
    ("max_length", "length", "starts"),
    [(20, 20, [3, 12]), (16, 16, [3, 12]), (15, 9, [3]), (12, 9, [3]), (7, 3, []), (6, 3, []), (3, 3, [])],
)
def test_a_row_is_never_cut_within_an_image_or_its_turn(max_length, length, starts):
    report = DataReport()
    (fitted,) = build_fitter(max_length=max_length).fit_row((PICTURED,), report)
    assert (len(fitted.input_ids), len(fitted.labels)) == (length, length)
    assert [placed.start for placed in fitted.pictures] == starts
    assert (report.num_images, report.num_rows_with_images) == (len(starts), int(bool(starts)))
    assert report.most_images_a_row == len(starts)
    assert report.num_truncated_rows == int(max_length < 20)


def test_a_row_is_left_out_where_its_images_would_have_other_tokens_without_one():
    images = SimpleNamespace(placeholders=SimpleNamespace(is_joined=True))
    chosen = Settings(max_length=15).data
    fitter = Fitter(Encoder(replace(VOCABULARY, images=images), chosen, "pretokenized"), chosen)
    report = DataReport()
    assert fitter.fit_row((PICTURED,), report) is None
    assert report.num_dropped_rows == 1
    fitter.settings = Settings(max_length=6).data
    (fitted,) = fitter.fit_row((PICTURED,), report)
    assert fitted.pictures == ()


def test_the_end_of_a_row_with_images_is_not_kept_without_them():
    report = DataReport()
    fitter = build_fitter(max_length=19, truncation_mode="keep_end")
    assert fitter.fit_row((PICTURED,), report) is None
    assert (report.num_dropped_rows, report.num_truncated_rows, report.num_rows) == (1, 0, 0)


def test_a_row_that_would_begin_within_an_image_is_left_out():
    report = DataReport()
    first = EncodedRow(PICTURED.input_ids, PICTURED.labels, pictures=(PlacedPicture("a.png", 0, 0, b"", "", 0, 9),))
    assert build_fitter(max_length=5).fit_row((first,), report) is None
    assert (report.num_dropped_rows, report.num_unsupervised_rows, report.num_truncated_rows) == (1, 0, 0)
