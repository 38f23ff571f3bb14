# SPDX-License-Identifier: Apache-2.0
"""Preview of the data before the first step: counts, warnings, and one row as it is trained on."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from llm_trainer.common import log
from llm_trainer.data.datasets import Data
from llm_trainer.data.formats import IGNORED
from llm_trainer.data.report import DataReport, list_names

MAX_SAMPLE_TOKENS = 200
COLOURED = ("\x1b[32m", "\x1b[0m")  # green
PLAIN = ("⟦", "⟧")


def log_data(data: Data, tokenizer: PreTrainedTokenizerBase, in_colour: bool) -> None:
    """Log what is trained on: counts, formats, warnings, and the first row."""
    for name, report in data.reports.items():
        lengths = ", ".join(f"{key} {tokens}" for key, tokens in report.length_percentiles().items())
        log.info(f"Data {name}: {report}; lengths: {lengths}")
        for source, row_format in report.formats.items():
            log.info(f"Data {name}: {source} has {row_format} rows; trained on: {report.loss_on[source]}")
        for text in find_data_warnings(name, report):
            log.warning(text)
    sample = mark_sample(data.sample[0], tokenizer, in_colour)
    log.info(f"Data train, the first row ({describe_marks(in_colour)}):\n{sample}")


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
    if report.num_truncated_rows:
        yield f"{report.num_truncated_rows} rows of the {name} data are longer than max_length and cut."
    if report.num_dropped_rows:
        yield f"{report.num_dropped_rows} rows of the {name} data are longer than max_length and left out."
    if report.num_unsupervised_rows:
        yield (
            f"{report.num_unsupervised_rows} rows of the {name} data are left out, since no token within "
            "max_length is trained on."
        )
    if report.num_bad_rows:
        yield f"{report.num_bad_rows} bad rows of the {name} data are left out, see output/data/rejected_rows.jsonl."
    if not report.num_supervised_eos:
        yield f"no row of the {name} data trains the end-of-sequence token: all are cut before it."


def find_content_warnings(name: str, report: DataReport) -> Iterator[str]:
    """Yield sentences about control tokens in messages, and about fields that nothing reads."""
    if report.control_tokens:
        yield describe_control_tokens(name, report)
    if report.unread_fields:
        yield explain_unread_fields(name, report)


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
        "field that is read, such as functions to tools. Only texts are trained on, and of messages only the "
        "assistant's, unless assistant_only_loss=false."
    )


def describe_marks(in_colour: bool) -> str:
    """Return the legend of the marks in a sample."""
    return "green: trained on" if in_colour else f"between {' and '.join(PLAIN)}: trained on"


def mark_sample(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, in_colour: bool) -> str:
    """Return a row's text with the parts that are trained on in colour or between marks.

    A long row is shown by its first and last MAX_SAMPLE_TOKENS / 2 tokens.
    """
    marks = COLOURED if in_colour else PLAIN
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    half = MAX_SAMPLE_TOKENS // 2
    parts = [pairs[:half], pairs[-half:]] if len(pairs) > MAX_SAMPLE_TOKENS else [pairs]
    return "\n[...]\n".join(mark_trained_tokens(part, tokenizer, marks) for part in parts)


def mark_trained_tokens(
    pairs: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]
) -> str:
    """Return the text of tokens, given with their labels, with marks around each run that is trained on."""
    begin, end = marks
    runs: list[tuple[bool, list[int]]] = []
    for token, label in pairs:
        is_trained = label != IGNORED
        if not runs or runs[-1][0] != is_trained:
            runs.append((is_trained, []))
        runs[-1][1].append(token)
    texts = ((is_trained, tokenizer.decode(ids)) for is_trained, ids in runs)
    return "".join(f"{begin}{text}{end}" if is_trained else text for is_trained, text in texts)
