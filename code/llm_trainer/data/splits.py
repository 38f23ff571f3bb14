# SPDX-License-Identifier: Apache-2.0
"""Preparation of the training and validation data: sources tokenized, hosts' parts exchanged, all of it judged."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, concatenate_datasets

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import append_rows
from llm_trainer.config.sections import DataSettings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.report import REJECTED_ROWS, DataReport
from llm_trainer.data.shard_exchange import LocalRankZeroGroup
from llm_trainer.data.streaming import SourceHead
from llm_trainer.data.token_cache import ROWS, prepare_source
from llm_trainer.job.inputs import Inputs
from llm_trainer.readers.sources import Source


@dataclass
class Split:
    """One split's prepared sources."""

    report: DataReport = field(default_factory=DataReport)
    files: dict[str, list[str]] = field(default_factory=dict)  # source -> its Arrow files, in the order of the hosts

    def open_datasets(self) -> dict[str, Dataset]:
        """Return each source's rows, memory-mapped, by the source's name."""
        return {
            name: concatenate_datasets([Dataset.from_file(file).remove_columns("digest") for file in files])
            for name, files in self.files.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the split as values ready for JSON."""
        return {"report": vars(self.report), "files": self.files}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Split":
        """Build a split from the parsed JSON of `to_json`."""
        return cls(DataReport.from_json(values["report"]), values["files"])


def prepare_splits(
    inputs: Inputs,
    vocabulary: Vocabulary,
    settings: DataSettings,
    rejected_rows: Path,
    rank_zero_group: LocalRankZeroGroup | None = None,
) -> tuple[dict[str, Split], list[str]]:
    """Return each split that the job has, and a sentence for everything that is wrong with any of them.

    With a group some sources are sharded: the rows of all hosts are judged together, and come to every host.
    """
    rejected_rows.unlink(missing_ok=True)  # an earlier job in the same tree may have left it
    preparation = Preparation(vocabulary, settings, rejected_rows, rank_zero_group)
    splits: dict[str, Split] = {}
    problems: list[str] = []
    for name, sources in list_sources(inputs, settings.streaming).items():
        splits[name], own = preparation.prepare_split(name, sources)
        own += splits[name].report.find_bad_rows(name, settings.max_bad_rows_fraction)
        # Where rows are missing, other flaws may only follow from that.
        problems += own or splits[name].report.find_flaws(name)
    problems += find_packing_problems(splits, settings)
    if rank_zero_group:
        problems = rank_zero_group.merge_problems(problems)
        if not problems:
            exchange_shards(splits, inputs, rank_zero_group)
    count_duplicates(splits)
    return splits, problems


def find_packing_problems(splits: dict[str, Split], settings: DataSettings) -> Iterator[str]:
    """Yield a sentence for each setting that asks for packing where rows have images, which are padded."""
    if any(split.report.num_images for split in splits.values()):
        for name in ("packing", "eval_packing"):
            if settings.value(name):
                yield f"{name}=true: rows have images, and such rows are padded: leave {name} out."


def list_sources(inputs: Inputs, streaming: bool) -> dict[str, Sequence[Source | SourceHead]]:
    """Return the sources of each split that has any; for training data that is streamed, their audited heads."""
    train = [SourceHead(source) for source in inputs.train] if streaming else inputs.train
    splits: dict[str, Sequence[Source | SourceHead]] = {"train": train, "validation": inputs.validation}
    return {name: sources for name, sources in splits.items() if sources}


@dataclass(frozen=True)
class Preparation:
    """The rules and places by which this host prepares its part of the data."""

    vocabulary: Vocabulary
    settings: DataSettings
    rejected_rows: Path  # the job's file of bad rows
    rank_zero_group: LocalRankZeroGroup | None

    def prepare_split(self, name: str, sources: Sequence[Source | SourceHead]) -> tuple[Split, list[str]]:
        """Return this host's part of a split, and a sentence for each reason why a source could not be prepared.

        The split's report counts the rows of all hosts.
        """
        group = self.rank_zero_group
        split = Split()
        problems: list[str] = []
        for source in sources:
            report = None
            try:
                folder, report = prepare_source(source, self.vocabulary, self.settings)
                split.files[source.name] = [str(folder / ROWS)]
                append_rejected_rows(folder / REJECTED_ROWS, self.rejected_rows, name)
            except UserError as error:
                problems += error.problems
            if group and source.is_sharded:
                report = group.merge_reports(source.name, report, problems)
            if report:
                split.report.add_report(report)
        return split, group.merge_problems(problems) if group else problems


def exchange_shards(splits: dict[str, Split], inputs: Inputs, rank_zero_group: LocalRankZeroGroup) -> None:
    """Copy every host's rows of sharded sources to every host."""
    for split, sources in (("train", inputs.train), ("validation", inputs.validation)):
        for source in sources:
            if source.is_sharded:
                (own_file,) = splits[split].files[source.name]
                shards = rank_zero_group.exchange_file(Path(own_file), f"{split}-{source.name}")
                splits[split].files[source.name] = list(map(str, shards))


def append_rejected_rows(own: Path, target: Path, split: str) -> None:
    """Append a source's bad rows, with the name of their split, to the job's file."""
    if not own.stat().st_size:
        return
    with own.open(encoding="utf-8") as rows:
        append_rows(target, ({"split": split, **json.loads(line)} for line in rows))


def count_duplicates(splits: dict[str, Split]) -> None:
    """Count duplicate rows, and training rows that are in the validation data too."""
    digests = {name: read_digests(split) for name, split in splits.items()}
    for name, own in digests.items():
        splits[name].report.num_duplicate_rows = len(own) - len(np.unique(own))
    if digests.keys() >= {"train", "validation"}:
        num_shared = int(np.isin(digests["train"], digests["validation"]).sum())
        splits["train"].report.num_rows_in_validation = num_shared


def read_digests(split: Split) -> npt.NDArray[np.uint64]:
    """Return the digest of each row of a split, [rows]."""
    files = [file for own in split.files.values() for file in own]
    columns = [Dataset.from_file(file).data.column("digest").to_numpy() for file in files]
    return np.concatenate([np.zeros(0, dtype=np.uint64), *columns])
