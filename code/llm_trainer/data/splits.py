# SPDX-License-Identifier: Apache-2.0
"""The training and the validation data: each source prepared, those of several hosts put together, all of it judged."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.report import DataReport
from llm_trainer.data.shard_exchange import Leaders
from llm_trainer.data.streaming import Head
from llm_trainer.data.token_cache import REJECTED, ROWS, prepare_source
from llm_trainer.job.inputs import Inputs
from llm_trainer.readers.sources import Source

COLUMNS = ["input_ids", "labels", "length"]


@dataclass
class Split:
    """What became of one split's sources, as far as they could be prepared."""

    report: DataReport = field(default_factory=DataReport)
    files: dict[str, list[str]] = field(default_factory=dict)  # source -> its Arrow files, in the order of the hosts

    def datasets(self) -> dict[str, Dataset]:
        """Source -> its rows, memory-mapped."""
        return {
            name: concatenate_datasets([Dataset.from_file(file).select_columns(COLUMNS) for file in files])
            for name, files in self.files.items()
        }

    def first_row(self) -> dict[str, Any] | None:
        return next((rows[0] for rows in self.datasets().values() if len(rows)), None)

    def to_json(self) -> dict[str, Any]:
        return {"report": vars(self.report), "files": self.files}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Split":
        return cls(DataReport.from_json(values["report"]), values["files"])


def prepare_splits(
    inputs: Inputs, vocabulary: Vocabulary, settings: Settings, rejected_rows: Path, leaders: Leaders | None = None
) -> tuple[dict[str, Split], list[str]]:
    """Each split that the job has, and a sentence for everything that is wrong with any of them.

    With `leaders` some sources are sharded: the rows of all hosts are judged together, and come to every host.
    """
    rejected_rows.unlink(missing_ok=True)  # of an earlier job in the same tree
    splits: dict[str, Split] = {}
    problems: list[str] = []
    for name, sources in list_sources(inputs, settings).items():
        splits[name], own = prepare_split(name, sources, vocabulary, settings, rejected_rows, leaders)
        own += splits[name].report.find_bad_rows(name, settings.data.max_bad_rows_fraction)
        # Where rows are missing, the others' flaws may only come from that.
        problems += own or splits[name].report.find_flaws(name)
    if leaders:
        problems = leaders.merge_problems(problems)
        if not problems:
            exchange_shards(splits, inputs, leaders)
    count_duplicates(splits)
    return splits, problems


def list_sources(inputs: Inputs, settings: Settings) -> dict[str, Sequence[Source | Head]]:
    """Each split's sources; of training data that is streamed only what is audited."""
    train = [Head(source) for source in inputs.train] if settings.data.streaming else inputs.train
    splits: dict[str, Sequence[Source | Head]] = {"train": train, "validation": inputs.validation}
    return {name: sources for name, sources in splits.items() if sources}


def prepare_split(
    name: str,
    sources: Sequence[Source | Head],
    vocabulary: Vocabulary,
    settings: Settings,
    rejected_rows: Path,
    leaders: Leaders | None,
) -> tuple[Split, list[str]]:
    """This host's part of a split, the report of all hosts' parts, and what kept sources from being prepared."""
    split = Split()
    problems: list[str] = []
    for source in sources:
        report = None
        try:
            folder, report = prepare_source(source, vocabulary, settings)
            split.files[source.name] = [str(folder / ROWS)]
            keep_rejected(folder / REJECTED, rejected_rows, name)
        except UserError as error:
            problems += error.problems
        if leaders and source.is_sharded:
            report = leaders.merge_reports(source.name, report, problems)
        if report:
            split.report.add(report)
    return split, leaders.merge_problems(problems) if leaders else problems


def exchange_shards(splits: dict[str, Split], inputs: Inputs, leaders: Leaders) -> None:
    """Have every host's rows of a sharded source on every host."""
    for split, sources in (("train", inputs.train), ("validation", inputs.validation)):
        for source in sources:
            if source.is_sharded:
                (own_file,) = splits[split].files[source.name]
                shards = leaders.exchange_file(Path(own_file), f"{split}-{source.name}")
                splits[split].files[source.name] = list(map(str, shards))


def keep_rejected(own: Path, target: Path, split: str) -> None:
    """Add a source's bad rows to those of the job."""
    if not own.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with own.open(encoding="utf-8") as rows, target.open("a", encoding="utf-8") as file:
        for line in rows:
            file.write(json.dumps({"split": split, **json.loads(line)}, ensure_ascii=False) + "\n")


def count_duplicates(splits: dict[str, Split]) -> None:
    """Count rows that are there twice, and training rows that are in the validation data too."""
    digests = {name: read_digests(split) for name, split in splits.items()}
    for name, own in digests.items():
        splits[name].report.num_duplicate_rows = len(own) - len(np.unique(own))
    if digests.keys() >= {"train", "validation"}:
        num_shared = int(np.isin(digests["train"], digests["validation"]).sum())
        splits["train"].report.num_rows_in_validation = num_shared


def read_digests(split: Split) -> Any:
    files = [file for own in split.files.values() for file in own]
    columns = [Dataset.from_file(file).data.column("digest").to_numpy() for file in files]
    return np.concatenate([np.zeros(0, dtype=np.uint64), *columns])
