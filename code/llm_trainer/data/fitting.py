# SPDX-License-Identifier: Apache-2.0
"""Fitting of tokenized rows into `max_length`: what is cut, what is left out, and the counts of both.

A row is one sequence, or a pair of them: the prompt with the chosen answer, and the prompt with the rejected one.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llm_trainer.config.sections import DataSettings
from llm_trainer.data.encoding import EncodedRow, Encoder
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.report import DataReport

Sequences = tuple[EncodedRow, ...]  # of one row


class Fitter:
    """Fits rows into `max_length`, and counts them in a report."""

    def __init__(self, encoder: Encoder, settings: DataSettings) -> None:
        self.encoder = encoder
        self.settings = settings

    def fit_row(self, row: Sequences, report: DataReport) -> Sequences | None:
        """Return the row, each sequence cut to `max_length`, and count it; None where it is left out."""
        limit = self.settings.max_length
        if self.settings.generates:
            return self.fit_prompt(row, report)
        for sequence in row:
            report.lengths[len(sequence.input_ids)] += 1
            report.note_image_tokens(sum(placed.tokens for placed in sequence.pictures))
        if self.settings.has_answers:
            count_answers(row, report)
        if limit is not None and any(len(sequence.input_ids) > limit for sequence in row):
            if not self.settings.apply_truncation:
                report.num_dropped_rows += 1
                return None
            cut = self.cut_row(row, limit, report)
            if cut is None:
                report.num_dropped_rows += 1
                return None
            report.num_truncated_rows += 1
            row = cut
        trained = [find_trained(sequence) for sequence in row]
        if not all(is_trained.any() for is_trained in trained):
            report.num_unsupervised_rows += 1
            return None
        if len(row) > 1 and are_equal(row):
            report.num_equal_pairs += 1
            return None
        report.num_rows += 1
        self.count_row(row, trained, report)
        return row

    def fit_prompt(self, row: Sequences, report: DataReport) -> Sequences | None:
        """Return a prompt and count it; None where it is longer than `max_length`. A part of it would ask otherwise."""
        (prompt,) = row
        length, limit = len(prompt.input_ids), self.settings.max_length
        report.lengths[length] += 1
        if limit is not None and length > limit:
            report.num_dropped_rows += 1
            return None
        report.num_rows += 1
        report.num_tokens += length
        report.control_tokens.update(prompt.control_tokens)
        return row

    def cut_row(self, row: Sequences, limit: int, report: DataReport) -> Sequences | None:
        """Return the row with each sequence cut, and count the answers of a pair that lose tokens by it.

        None where its end alone would be kept, without images that it may speak of, or nothing before an image is
        trained on.
        """
        keeps_end = self.settings.truncation_mode == "keep_end"
        if keeps_end and any(sequence.pictures for sequence in row):
            return None
        cut = tuple(cut_sequence(sequence, limit, keeps_end) for sequence in row)
        loses_images = any(len(part.pictures) < len(whole.pictures) for whole, part in zip(row, cut, strict=True))
        if loses_images and not all(map(self.can_lose_images, cut)):
            return None
        if self.settings.has_answers:
            lost = (count_trained(whole) > count_trained(part) for whole, part in zip(row, cut, strict=True))
            report.num_cut_answers += sum(lost)
        return cut

    def can_lose_images(self, part: EncodedRow) -> bool:
        """Tell whether a sequence that lost images is of use: it is trained on, and those left have the same tokens."""
        images = self.encoder.vocabulary.images
        joins = bool(part.pictures) and images is not None and images.placeholders.is_joined
        return bool(find_trained(part).any()) and not joins

    def count_row(self, row: Sequences, trained: list[npt.NDArray[np.bool_]], report: DataReport) -> None:
        """Count a row that is kept; `trained` has an array [length] a sequence, true at tokens that are trained on."""
        trains_stop = misses_stop = False
        for sequence, is_trained in zip(row, trained, strict=True):
            is_stop = self.encoder.find_stops(sequence.input_ids)
            # The last token of a turn that is trained on, where the stop token after it is not.
            missed = is_stop[1:] & ~is_trained[1:] & is_trained[:-1] & ~is_stop[:-1]
            trains_stop |= bool((is_stop & is_trained).any())
            misses_stop |= bool(missed.any())
            report.num_tokens += len(sequence.input_ids)
            report.num_supervised_tokens += int(np.count_nonzero(is_trained))
        report.num_supervised_eos += trains_stop
        report.num_missed_stops += misses_stop
        num_images = max(len(sequence.pictures) for sequence in row)  # both sides of a pair see those of its prompt
        report.num_images += num_images
        report.most_images_a_row = max(report.most_images_a_row, num_images)
        report.num_rows_with_images += num_images > 0
        report.num_desirable_rows += self.settings.is_judged and row[0].is_desirable
        report.num_rows_in_pieces += any(sequence.is_in_pieces for sequence in row)
        report.control_tokens.update(frozenset().union(*(sequence.control_tokens for sequence in row)))


def cut_sequence(sequence: EncodedRow, limit: int, keeps_end: bool) -> EncodedRow:
    """Return a sequence of at most `limit` tokens.

    One with images ends before the first that would be cut, with the last token that is trained on. So nothing of the
    image's turn is left.
    """
    lost = [placed.start for placed in sequence.pictures if placed.start + placed.tokens > limit]
    if lost:
        trained = np.flatnonzero(sequence.labels[: min(limit, lost[0])] != IGNORED)
        limit = int(trained[-1]) + 1 if len(trained) else 0
    pictures = tuple(placed for placed in sequence.pictures if placed.start + placed.tokens <= limit)
    kept = slice(-limit, None) if keeps_end else slice(limit)
    return replace(sequence, input_ids=sequence.input_ids[kept], labels=sequence.labels[kept], pictures=pictures)


def find_trained(sequence: EncodedRow) -> npt.NDArray[np.bool_]:
    """Return a mask [length] that is true at tokens that are trained on: nothing predicts the first one."""
    is_trained = sequence.labels != IGNORED
    is_trained[:1] = False  # a row that would be cut within its first tokens has none
    return is_trained


def count_trained(sequence: EncodedRow) -> int:
    """Return the number of tokens with a label."""
    return int(np.count_nonzero(sequence.labels != IGNORED))


def count_answers(row: Sequences, report: DataReport) -> None:
    """Count the tokens of a row's answers, before they are cut. A desirable one counts as chosen."""
    sides = [report.chosen_lengths, report.rejected_lengths]
    for answer, lengths in zip(row, sides if row[0].is_desirable else sides[1:], strict=False):
        lengths[count_trained(answer)] += 1


def are_equal(pair: Sequences) -> bool:
    """Tell whether both sides of a pair are the same tokens, from which nothing is learned."""
    chosen, rejected = pair
    return np.array_equal(chosen.input_ids, rejected.input_ids)
