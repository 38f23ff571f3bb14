# SPDX-License-Identifier: Apache-2.0
"""Report on the rows of a data set: counted while they are prepared, judged before the first step."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_trainer.common.errors import MAX_LISTED_PROBLEMS

MAX_NAMED_FILES = 10
MAX_COUNTED_FIELDS = 100
PERCENTILES = (50, 90, 95, 99)
LARGEST = ("sequences_a_row", "most_images_a_row", "most_image_tokens")  # added up, these stay the largest
PAIR_COUNTS = ("sequences_a_row", "num_equal_pairs", "num_swapped_pairs", "num_cut_answers", "num_desirable_rows")
# Fields that a summary has in another form, or not at all.
UNLISTED = frozenset({"lengths", "bad_rows", "damage", "chosen_lengths", "rejected_lengths", *PAIR_COUNTS})
REJECTED_ROWS = "rejected_rows.jsonl"  # the file that lists bad rows


@dataclass
class DataReport:
    """Counts of one data set, or of several that are trained on together.

    Lengths are in tokens, before truncation. A pair of answers is a row of two sequences.
    """

    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256
    formats: dict[str, str] = field(default_factory=dict)  # source -> format of its rows
    loss_on: dict[str, str] = field(default_factory=dict)  # source -> the tokens that are trained on, in words
    num_rows: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_supervised_eos: int = 0  # rows that train a stop token
    num_missed_stops: int = 0  # rows with a turn that is trained on without the stop token after it
    num_rows_in_pieces: int = 0  # rows in which a token would have run over the edge of prompt and answer
    control_tokens: Counter[str] = field(default_factory=Counter)  # in messages -> rows
    num_truncated_rows: int = 0
    num_dropped_rows: int = 0  # longer than max_length, with apply_truncation=false
    num_unsupervised_rows: int = 0  # left out, because no token within max_length is trained on
    num_bad_rows: int = 0
    num_images: int = 0
    num_rows_with_images: int = 0
    most_images_a_row: int = 0
    most_image_tokens: int = 0  # of the images of a sequence, before truncation
    num_rows_without_column: int = 0  # of images, and with the text <image>, for a model that sees
    num_duplicate_rows: int = 0  # the same tokens as an earlier row of the data set
    num_rows_in_validation: int = 0
    bad_rows: list[str] = field(default_factory=list)  # sentences about the first of them
    damage: list[str] = field(default_factory=list)  # a sentence for each file that could not be read to its end
    empty_files: list[str] = field(default_factory=list)  # files without a row
    lengths: Counter[int] = field(default_factory=Counter)  # length -> rows, or sequences where rows are pairs
    unread_fields: Counter[str] = field(default_factory=Counter)  # field of a row that nothing reads -> rows with it
    # Of pairs of a chosen and a rejected answer:
    sequences_a_row: int = 1  # 2 where rows are pairs
    num_equal_pairs: int = 0  # left out, because both answers are the same within max_length
    num_swapped_pairs: int = 0  # whose own scores prefer the rejected answer
    # Of pairs, and of judged answers, where chosen ones are the desirable ones:
    num_cut_answers: int = 0  # that lose tokens to max_length
    num_desirable_rows: int = 0
    chosen_lengths: Counter[int] = field(default_factory=Counter)  # tokens of the answer -> rows
    rejected_lengths: Counter[int] = field(default_factory=Counter)

    def note_bad_row(self, problem: str) -> None:
        """Count a bad row, and keep its sentence unless there are many."""
        self.num_bad_rows += 1
        if len(self.bad_rows) < MAX_LISTED_PROBLEMS:
            self.bad_rows.append(problem)

    def note_image_tokens(self, tokens: int) -> None:
        """Keep the largest number of tokens of a sequence's images."""
        self.most_image_tokens = max(self.most_image_tokens, tokens)

    def note_unread_fields(self, names: Iterable[str]) -> None:
        """Count the fields of a row that nothing reads, as far as they are not very many."""
        for name in names:
            if name in self.unread_fields or len(self.unread_fields) < MAX_COUNTED_FIELDS:
                self.unread_fields[name] += 1

    def add_report(self, other: "DataReport") -> None:
        """Add the counts of another report, such as a chunk's or another source's."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(own, dict):
                own.update(value)  # a Counter adds up
            elif name == "bad_rows":
                own.extend(value[: MAX_LISTED_PROBLEMS - len(own)])
            elif name in LARGEST:
                setattr(self, name, max(own, value))
            else:
                setattr(self, name, own + value)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DataReport":
        """Build a report from the parsed JSON of its fields, in which lengths are texts."""
        lengths = {
            name: Counter({int(length): rows for length, rows in values[name].items()})
            for name in ("lengths", "chosen_lengths", "rejected_lengths")
        }
        counts = {name: Counter(values[name]) for name in ("control_tokens", "unread_fields")}
        return cls(**{**values, **lengths, **counts})

    @property
    def supervised_share(self) -> float:
        """The share of the tokens that are trained on, from 0 to 1."""
        return self.num_supervised_tokens / max(1, self.num_tokens)

    @property
    def longest_row_tokens(self) -> int:
        """The tokens of the longest row, before truncation; 0 without rows."""
        return max(self.lengths, default=0)

    @property
    def has_pairs(self) -> bool:
        """True where a row is a pair of answers to one prompt."""
        return self.sequences_a_row > 1

    @property
    def is_judged(self) -> bool:
        """True where a row's answer is desirable or undesirable."""
        return not self.has_pairs and bool(self.chosen_lengths or self.rejected_lengths)

    @property
    def has_prompts(self) -> bool:
        """True where rows are prompts, which are not trained on themselves."""
        return "prompt" in self.formats.values()

    @property
    def image_share(self) -> str:
        """The end of a clause about rows that are too long: what their images add, and how to lower it."""
        if not self.most_image_tokens:
            return ""
        most = f"{self.most_image_tokens:,} tokens"
        return f", and the images of one take up to {most}, which image_processor_options can lower"

    @property
    def num_left_out(self) -> int:
        """The rows that are left out, though nothing is wrong with their form."""
        return self.num_dropped_rows + self.num_unsupervised_rows + self.num_equal_pairs

    def length_percentiles(self) -> dict[str, int]:
        """Return the percentiles of the sequences' lengths in tokens, and the longest length."""
        return find_percentiles(self.lengths)

    def summary(self) -> dict[str, Any]:
        """Return the counts, ready for JSON, for the manifest and `validate --json`."""
        values = {name: value for name, value in vars(self).items() if name not in UNLISTED}
        shares = {"supervised_share": round(self.supervised_share, 4), "longest_row_tokens": self.longest_row_tokens}
        own = {"pairs": self.describe_pairs()} if self.has_pairs else {}
        own |= {"judged": self.describe_judged()} if self.is_judged else {}
        return {**values, **shares, "length_percentiles": self.length_percentiles(), **own}

    def describe_pairs(self) -> dict[str, Any]:
        """Return the counts that only pairs have; lengths are those of the answers, without the prompt."""
        lengths = {"chosen": self.chosen_lengths, "rejected": self.rejected_lengths}
        return {
            "sequences_a_row": self.sequences_a_row,
            "equal": self.num_equal_pairs,
            "swapped": self.num_swapped_pairs,
            "cut_answers": self.num_cut_answers,
            **describe_sides(lengths),
        }

    def describe_judged(self) -> dict[str, Any]:
        """Return the counts that only judged answers have; lengths are those of the answers, without the prompt."""
        lengths = {"desirable": self.chosen_lengths, "undesirable": self.rejected_lengths}
        counts = {"desirable": self.num_desirable_rows, "undesirable": self.num_rows - self.num_desirable_rows}
        share = round(self.num_desirable_rows / max(1, self.num_rows), 4)
        return {**counts, "desirable_share": share, "cut_answers": self.num_cut_answers, **describe_sides(lengths)}

    def __str__(self) -> str:
        """Return the counts as one line for the log."""
        if self.has_prompts:
            return (
                f"{self.num_rows} prompts, {self.num_tokens} tokens, longest prompt {self.longest_row_tokens} tokens, "
                f"{self.num_left_out} left out, {self.num_bad_rows} bad"
            )
        rows, sequence = ("pairs", "sequence") if self.has_pairs else ("rows", "row")
        images = f", {self.num_images} images" if self.num_images else ""
        return (
            f"{self.num_rows} {rows}{images}, {self.num_tokens} tokens ({self.supervised_share:.1%} trained on), "
            f"longest {sequence} {self.longest_row_tokens} tokens, {self.num_truncated_rows} {rows} cut, "
            f"{self.num_left_out} left out, {self.num_bad_rows} bad"
        )

    def find_bad_rows(self, name: str, max_bad_rows_fraction: float) -> Iterator[str]:
        """Yield a sentence for each damaged file, and for bad rows unless that many may be left out."""
        yield from self.damage
        num_read = self.lengths.total() // self.sequences_a_row + self.num_bad_rows
        if self.num_bad_rows > max_bad_rows_fraction * num_read:
            yield from self.bad_rows
            if self.num_bad_rows > len(self.bad_rows) or max_bad_rows_fraction > 0:
                yield (
                    f"The {name} data has {self.num_bad_rows} bad rows among {num_read}, all of them in "
                    f"output/data/rejected_rows.jsonl, and max_bad_rows_fraction={max_bad_rows_fraction:g} allows "
                    f"{int(max_bad_rows_fraction * num_read)}: mend them, or allow more."
                )

    def explain_lack_of_rows(self) -> str:
        """Return the rest of a sentence about why there is nothing to train on; empty where there is."""
        if not self.lengths:
            found = f"empty: {list_names(self.empty_files)}" if self.empty_files else "no file was read"
            return f"rows ({found}): put rows there."
        if not self.num_rows and self.num_dropped_rows:
            cuts = ", or set apply_truncation=true, which cuts rows, but never within an image"
            fix = "" if self.has_prompts else cuts  # prompts are never cut
            told = f"{self.num_dropped_rows} were longer than max_length{self.image_share}"
            return f"rows left ({told}): raise max_length{fix}."
        if not self.num_rows and self.num_equal_pairs:
            return (
                f"pairs left ({self.num_equal_pairs} have the same chosen and rejected answer within max_length): give "
                "pairs of two answers, and raise max_length where these begin alike."
            )
        return ""

    def find_flaws(self, name: str) -> Iterator[str]:
        """Yield a sentence where training on the usable rows would fail, or teach the wrong thing."""
        if reason := self.explain_lack_of_rows():
            yield f"The {name} data has no {reason}"
        elif self.is_judged and self.num_desirable_rows in (0, self.num_rows):
            word = "desirable" if self.num_desirable_rows else "undesirable"
            yield (
                f"All {self.num_rows} rows of the {name} data are {word}, so there is nothing to compare: give "
                "desirable and undesirable answers."
            )
        elif self.has_prompts:
            return
        elif not self.num_supervised_tokens:
            yield (
                f"No token of the {name} data is trained on: every row needs an assistant message, a completion or a "
                f"label within max_length{self.image_share}; raise max_length, or give such rows."
            )
        elif self.num_missed_stops:
            yield (
                f"{self.num_missed_stops} of {self.num_rows} rows of the {name} data train on a turn without the "
                "end-of-sequence token after it, so the model would never learn to stop: put the token inside "
                "{% generation %}...{% endgeneration %} of the chat template, or label it in pretokenized rows."
            )
        elif not self.num_supervised_eos and self.num_truncated_rows < self.num_rows:
            yield (
                f"No row of the {name} data trains the end-of-sequence token, so the model would never learn to stop: "
                "give a chat template whose assistant turns include it, or rows that end in it."
            )


def describe_sides(lengths: dict[str, Counter[int]]) -> dict[str, dict[str, float]]:
    """Return the figures of the lengths of each side's answers."""
    return {
        f"{side}_tokens": {"mean": round(compute_mean(own), 1), **find_percentiles(own)}
        for side, own in lengths.items()
    }


def find_percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Return the percentiles of lengths, given with their counts, and the longest length."""
    total, seen, found = lengths.total(), 0, {}
    wanted = list(PERCENTILES)
    for length in sorted(lengths):
        seen += lengths[length]
        while wanted and seen * 100 >= wanted[0] * total:
            found[f"p{wanted.pop(0)}"] = length
    return {**found, "longest": max(lengths, default=0)}


def compute_mean(lengths: Counter[int]) -> float:
    """Return the mean of lengths, given with their counts; 0 without any."""
    return sum(length * number for length, number in lengths.items()) / max(1, lengths.total())


def list_names(files: list[str]) -> str:
    """Return the names of files for a sentence, with the number of those that are too many to name."""
    more = f" and {len(files) - MAX_NAMED_FILES} more" if len(files) > MAX_NAMED_FILES else ""
    return ", ".join(files[:MAX_NAMED_FILES]) + more
