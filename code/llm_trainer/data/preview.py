# SPDX-License-Identifier: Apache-2.0
"""Preview of the data before the first step: counts, warnings, and one row as it is trained on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_trainer.common import log
from llm_trainer.config.sections import MethodSettings
from llm_trainer.data.datasets import Data
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.shown import (
    Piece,
    decode_pieces,
    find_shown_row,
    list_pictures,
    replace_images,
    show_images,
)
from llm_trainer.data.report import DataReport, compute_mean, list_names
from llm_trainer.journal.records import SampleRow, ShownImage
from llm_trainer.readers.images import ImageRules
from llm_trainer.readers.rows import IMAGE_COLUMNS, PLACEHOLDER
from llm_trainer.readers.thumbnails import MAX_A_ROW, describe_image

MAX_SAMPLE_TOKENS = 200
MOST_WEIGHT = 1.33  # of all desirable answers, over the weight of all undesirable ones; the least is 1
JUDGEMENTS = ("desirable", "undesirable")
MAX_LENGTH_RATIO = 1.2  # of the mean lengths of chosen and rejected answers
COLOURED = ("\x1b[32m", "\x1b[0m")  # green
PLAIN = ("⟦", "⟧")
REJECTED_COLOURED = ("\x1b[31m", "\x1b[0m")  # red
REJECTED_PLAIN = ("⟪", "⟫")

Labelled = tuple[Piece, int]  # a token, or the words for an image, with its label


@dataclass(frozen=True)
class Sample:
    """A row that a person is shown: the first, or the first with images."""

    row: dict[str, Any]
    images: list[ShownImage]

    @property
    def name(self) -> str:
        """The name of the row in a sentence."""
        return "the first row with images" if self.images else "the first row"

    def mark(self, tokenizer: PreTrainedTokenizerBase, in_colour: bool) -> str:
        """Return the row's text as `mark_sample` does, and a line for each of its images."""
        text = mark_sample(self.row, tokenizer, in_colour, self.images)
        return "\n".join(
            [text, *(f"image {number}: {describe_image(own)}" for number, own in enumerate(self.images, 1))]
        )

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, SampleRow]:
        """Return the field of a journal's record for a row with images; none for a row of text."""
        text = mark_sample(self.row, tokenizer, False, self.images)
        return {"sample": SampleRow(text=text, images=self.images)} if self.images else {}


def choose_sample(datasets: Iterable[Dataset], rules: ImageRules) -> Sample | None:
    """Return the row to show among those of a split's sources; None where there is no row."""
    row = find_shown_row(datasets)
    return Sample(row, show_images(list_pictures(row), rules, MAX_A_ROW)) if row else None


def log_data(data: Data, sample: Sample, tokenizer: PreTrainedTokenizerBase, in_colour: bool) -> None:
    """Log what is trained on: counts, formats, warnings, and one row."""
    for name, report in data.reports.items():
        log.info(f"Data {name}: {report}; lengths: {list_figures(report.length_percentiles())}")
        if report.has_pairs:
            pairs = report.describe_pairs()
            chosen, rejected = (list_figures(pairs[f"{side}_tokens"]) for side in ("chosen", "rejected"))
            log.info(f"Data {name}: tokens of the answers: chosen {chosen}; rejected {rejected}")
        if report.is_judged:
            log.info(f"Data {name}: {describe_judgements(report)}")
        for source, row_format in report.formats.items():
            log.info(f"Data {name}: {source} has {row_format} rows; trained on: {report.loss_on[source]}")
        for text in find_data_warnings(name, report):
            log.warning(text)
    marks = describe_marks(in_colour, data.reports["train"].has_pairs)
    log.info(f"Data train, {sample.name} ({marks}):\n{sample.mark(tokenizer, in_colour)}")


def describe_judgements(report: DataReport) -> str:
    """Return a sentence on how many answers are desirable, and on the lengths of both kinds."""
    judged = report.describe_judged()
    sides = (f"{judged[side]} {side}, tokens {list_figures(judged[f'{side}_tokens'])}" for side in JUDGEMENTS)
    return f"{judged['desirable_share']:.1%} of the answers are desirable: {'; '.join(sides)}"


def list_figures(figures: Mapping[str, float]) -> str:
    """Return figures with their names, for a sentence."""
    return ", ".join(f"{name} {value}" for name, value in figures.items())


def find_data_warnings(name: str, report: DataReport) -> Iterator[str]:
    """Yield sentences about properties of a split that may be meant and are often a mistake."""
    if report.num_rows_in_validation:
        yield f"{report.num_rows_in_validation} rows of the {name} data are in the validation data too."
    if report.empty_files:
        yield f"the {name} data has empty files: {list_names(report.empty_files)}."
    if report.num_duplicate_rows:
        yield f"{report.num_duplicate_rows} rows of the {name} data repeat an earlier one."
    if report.num_rows_in_pieces:
        yield (
            f"{report.num_rows_in_pieces} rows of the {name} data have answers that begin within a token: prompt and "
            "answer are tokenized apart, as a server does. Put white space at the answer's start, not the prompt's end."
        )
    yield from find_content_warnings(name, report)
    yield from find_pair_warnings(name, report)
    yield from find_length_warnings(name, report)
    if report.num_bad_rows:
        yield f"{report.num_bad_rows} bad rows of the {name} data are left out, see output/data/rejected_rows.jsonl."
    if not report.num_supervised_eos and not report.has_prompts:
        yield f"no row of the {name} data trains the end-of-sequence token: all are cut before it."


def find_length_warnings(name: str, report: DataReport) -> Iterator[str]:
    """Yield sentences about rows that `max_length` cuts or leaves out, and about the share of images in that."""
    images = report.image_share
    if report.num_truncated_rows:
        yield f"{report.num_truncated_rows} rows of the {name} data are longer than max_length and cut{images}."
    if report.num_dropped_rows:
        yield f"{report.num_dropped_rows} rows of the {name} data are longer than max_length and left out{images}."
    if report.num_unsupervised_rows:
        yield (
            f"{report.num_unsupervised_rows} rows of the {name} data are left out, since no token within "
            f"max_length is trained on{images}."
        )


def find_content_warnings(name: str, report: DataReport) -> Iterator[str]:
    """Yield sentences about control tokens in messages, and about fields that nothing reads."""
    if report.control_tokens:
        yield describe_control_tokens(name, report)
    if report.num_rows_without_column:
        yield (
            f"{report.num_rows_without_column} rows of the {name} data have the text {PLACEHOLDER} and no column "
            f"{' or '.join(map(repr, IMAGE_COLUMNS))}: it is read as text. Rename the column that has their images."
        )
    if report.unread_fields:
        yield explain_unread_fields(name, report)


def find_pair_warnings(name: str, report: DataReport) -> Iterator[str]:
    """Yield warnings of pairs: equal answers, swapped ones, answers that were cut, and one side that is longer."""
    if report.num_equal_pairs:
        yield (
            f"{report.num_equal_pairs} pairs of the {name} data are left out, since chosen and rejected are the same "
            "within max_length."
        )
    if report.num_swapped_pairs:
        yield (
            f"{report.num_swapped_pairs} pairs of the {name} data have a lower score for the chosen answer than for "
            "the rejected one: are the two swapped?"
        )
    if report.num_cut_answers:
        yield f"{report.num_cut_answers} answers of the {name} data lose tokens to max_length."
    chosen, rejected = compute_mean(report.chosen_lengths), compute_mean(report.rejected_lengths)
    if max(chosen, rejected) > MAX_LENGTH_RATIO * min(chosen, rejected):
        longer = "longer" if chosen > rejected else "shorter"
        one, other = ("chosen", "rejected") if report.has_pairs else JUDGEMENTS
        yield (
            f"the {one} answers of the {name} data are {longer} than the {other} ones, {chosen:.0f} tokens on "
            f"average to {rejected:.0f}: the model may learn length instead of what is preferred."
        )


def advise_weights(report: DataReport, methods: MethodSettings) -> Iterator[str]:
    """Yield a sentence where the weights of training rows leave one kind of answers far ahead of the other.

    The ranges are those of equation 8 of KTO's paper, as TRL warns of them.
    """
    if not report.is_judged:
        return
    given = methods.desirable_weight, methods.undesirable_weight
    desirable, undesirable = (1.0 if weight is None else weight for weight in given)
    weights = report.num_desirable_rows * desirable, (report.num_rows - report.num_desirable_rows) * undesirable
    ratio = weights[0] / weights[1] if all(weights) else 0.0
    if ratio and not 1 <= round(ratio, 2) <= MOST_WEIGHT:
        lowest, least = desirable / ratio, undesirable * ratio
        yield (
            f"{report.describe_judged()['desirable_share']:.1%} of the answers of the train data are desirable, and "
            f"with their weights these count {ratio:.2f} times as much as the others: set either desirable_weight "
            f"between {lowest:.2f} and {lowest * MOST_WEIGHT:.2f}, or undesirable_weight between "
            f"{least / MOST_WEIGHT:.2f} and {least:.2f}."
        )


def describe_control_tokens(name: str, report: DataReport) -> str:
    """Return a sentence on the control tokens in the messages of a split."""
    found = list_names([f"{token} in {rows}" for token, rows in report.control_tokens.most_common()])
    return (
        f"rows of the {name} data have control tokens of the tokenizer in their messages ({found}), which the model "
        "reads as such. escape_control_tokens=true makes them plain text."
    )


def explain_unread_fields(name: str, report: DataReport) -> str:
    """Return the sentence for the user about the fields of a split's rows that nothing reads."""
    counts = [f"{field} ({rows} rows)" for field, rows in sorted(report.unread_fields.items())]
    return (
        f"the {name} data has fields that nothing reads: {list_names(counts)}. Rename what shall be trained on to a "
        "field that is read, such as functions to tools. Only texts and images are read, and of messages only the "
        "assistant's, unless assistant_only_loss=false."
    )


def describe_marks(in_colour: bool, has_pairs: bool = False) -> str:
    """Return the legend of the marks in a sample."""
    if has_pairs:
        chosen, rejected = ("green", "red") if in_colour else map(name_marks, (PLAIN, REJECTED_PLAIN))
        return f"{chosen}: chosen, {rejected}: rejected"
    return f"{'green' if in_colour else name_marks(PLAIN)}: trained on"


def name_marks(marks: tuple[str, str]) -> str:
    """Return words for the text between two marks."""
    return f"between {' and '.join(marks)}"


def mark_sample(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, in_colour: bool, images: Sequence[ShownImage] = ()
) -> str:
    """Return a row's text with the parts that are trained on in colour or between marks.

    A long text is shown by its first and last MAX_SAMPLE_TOKENS / 2 tokens, and an image by a few words. Of a pair, the
    beginning that both sides share is shown once.
    """
    marks = COLOURED if in_colour else PLAIN
    tokens: list[Labelled] = list(zip(row["input_ids"], row["labels"], strict=True))

    def mark_part(first: int, last: int, own_marks: tuple[str, str]) -> str:
        pieces = replace_images(tokens[first:last], images, lambda words: (words, IGNORED), first)
        return mark_ends(pieces, tokenizer, own_marks)

    end, *others = row.get("seq_lengths", [len(tokens)])
    if not others:
        return mark_part(0, end, marks)
    num_shared = count_shared_prompt(tokens[:end], tokens[end:])
    rejected_marks = REJECTED_COLOURED if in_colour else REJECTED_PLAIN
    parts = (0, num_shared, marks), (num_shared, end, marks), (end + num_shared, len(tokens), rejected_marks)
    return "\n".join(mark_part(*part) for part in parts)


def count_shared_prompt(chosen: list[Labelled], rejected: list[Labelled]) -> int:
    """Return how many tokens, given with their labels, begin both sides of a pair and are not trained on."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    differing = (place for place, (one, other) in pairs if one != other or one[1] != IGNORED)
    return next(differing, min(len(chosen), len(rejected)))


def mark_ends(tokens: list[Labelled], tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> str:
    """Return the marked text of tokens, given with their labels, without the middle of many."""
    half = MAX_SAMPLE_TOKENS // 2
    parts = [tokens[:half], tokens[-half:]] if len(tokens) > MAX_SAMPLE_TOKENS else [tokens]
    return "\n[...]\n".join(mark_trained_tokens(part, tokenizer, marks) for part in parts)


def mark_trained_tokens(pairs: list[Labelled], tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]) -> str:
    """Return the text of tokens, given with their labels, with marks around each run that is trained on."""
    begin, end = marks
    runs: list[tuple[bool, list[Piece]]] = []
    for token, label in pairs:
        is_trained = label != IGNORED
        if not runs or runs[-1][0] != is_trained:
            runs.append((is_trained, []))
        runs[-1][1].append(token)
    texts = ((is_trained, decode_pieces(pieces, tokenizer)) for is_trained, pieces in runs)
    return "".join(f"{begin}{text}{end}" if is_trained else text for is_trained, text in texts)
