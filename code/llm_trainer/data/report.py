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
REJECTED_ROWS = "rejected_rows.jsonl"  # the file that lists bad rows


@dataclass
class DataReport:
    """Counts of one data set, or of several that are trained on together.

    Lengths are in tokens, before truncation.
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
    num_duplicate_rows: int = 0  # the same tokens as an earlier row of the data set
    num_rows_in_validation: int = 0
    bad_rows: list[str] = field(default_factory=list)  # sentences about the first of them
    damage: list[str] = field(default_factory=list)  # a sentence for each file that could not be read to its end
    empty_files: list[str] = field(default_factory=list)  # files without a row
    lengths: Counter[int] = field(default_factory=Counter)  # length -> rows
    unread_fields: Counter[str] = field(default_factory=Counter)  # field of a row that nothing reads -> rows with it

    def note_bad_row(self, problem: str) -> None:
        """Count a bad row, and keep its sentence unless there are many."""
        self.num_bad_rows += 1
        if len(self.bad_rows) < MAX_LISTED_PROBLEMS:
            self.bad_rows.append(problem)

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
            else:
                setattr(self, name, own + value)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DataReport":
        """Build a report from the parsed JSON of its fields, in which lengths are texts."""
        lengths = Counter({int(length): rows for length, rows in values["lengths"].items()})
        counts = {name: Counter(values[name]) for name in ("control_tokens", "unread_fields")}
        return cls(**{**values, "lengths": lengths, **counts})

    @property
    def supervised_share(self) -> float:
        """The share of the tokens that are trained on, from 0 to 1."""
        return self.num_supervised_tokens / max(1, self.num_tokens)

    @property
    def longest_row_tokens(self) -> int:
        """The tokens of the longest row, before truncation; 0 without rows."""
        return max(self.lengths, default=0)

    def length_percentiles(self) -> dict[str, int]:
        """Return the percentiles of the rows' lengths in tokens, and the longest length."""
        total, seen, found = self.lengths.total(), 0, {}
        wanted = list(PERCENTILES)
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            while wanted and seen * 100 >= wanted[0] * total:
                found[f"p{wanted.pop(0)}"] = length
        return {**found, "longest": self.longest_row_tokens}

    def summary(self) -> dict[str, Any]:
        """Return the counts, ready for JSON, for the manifest and `validate --json`."""
        values = {name: value for name, value in vars(self).items() if name not in ("lengths", "bad_rows", "damage")}
        shares = {"supervised_share": round(self.supervised_share, 4), "longest_row_tokens": self.longest_row_tokens}
        return {**values, **shares, "length_percentiles": self.length_percentiles()}

    def __str__(self) -> str:
        """Return the counts as one line for the log."""
        return (
            f"{self.num_rows} rows, {self.num_tokens} tokens ({self.supervised_share:.1%} trained on), longest row "
            f"{self.longest_row_tokens} tokens, {self.num_truncated_rows} rows cut, "
            f"{self.num_dropped_rows + self.num_unsupervised_rows} left out, {self.num_bad_rows} bad"
        )

    def find_bad_rows(self, name: str, max_bad_rows_fraction: float) -> Iterator[str]:
        """Yield a sentence for each damaged file, and for bad rows unless that many may be left out."""
        yield from self.damage
        num_read = self.lengths.total() + self.num_bad_rows
        if self.num_bad_rows > max_bad_rows_fraction * num_read:
            yield from self.bad_rows
            if self.num_bad_rows > len(self.bad_rows) or max_bad_rows_fraction > 0:
                yield (
                    f"The {name} data has {self.num_bad_rows} bad rows among {num_read}, all of them in "
                    f"output/data/rejected_rows.jsonl, and max_bad_rows_fraction={max_bad_rows_fraction:g} allows "
                    f"{int(max_bad_rows_fraction * num_read)}: mend them, or allow more."
                )

    def find_flaws(self, name: str) -> Iterator[str]:
        """Yield a sentence where training on the usable rows would fail, or teach the wrong thing."""
        if not self.lengths:
            found = f"empty: {list_names(self.empty_files)}" if self.empty_files else "no file was read"
            yield f"The {name} data has no rows ({found}): put rows there."
        elif not self.num_rows and self.num_dropped_rows:
            yield (
                f"The {name} data has no rows left ({self.num_dropped_rows} were longer than max_length): "
                "raise max_length or set apply_truncation=true."
            )
        elif not self.num_supervised_tokens:
            yield (
                f"No token of the {name} data is trained on: every row needs an assistant message, a completion or a "
                "label within max_length; raise max_length, or give such rows."
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


def list_names(files: list[str]) -> str:
    """Return the names of files for a sentence, with the number of those that are too many to name."""
    more = f" and {len(files) - MAX_NAMED_FILES} more" if len(files) > MAX_NAMED_FILES else ""
    return ", ".join(files[:MAX_NAMED_FILES]) + more
