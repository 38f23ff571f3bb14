# SPDX-License-Identifier: Apache-2.0
"""The job's data: prepared once a host, memory-mapped by every rank."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank, run_on_local_rank_zero
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.report import DataReport
from llm_trainer.data.shard_exchange import Leaders
from llm_trainer.data.splits import Split, prepare_splits
from llm_trainer.data.streaming import open_stream
from llm_trainer.data.token_cache import REJECTED
from llm_trainer.job.job import Job


@dataclass(frozen=True)
class Data:
    """What a job trains on and is measured with: each row's `input_ids`, `labels` and, unless streamed, `length`."""

    splits: dict[str, Dataset | IterableDataset]  # train, and validation if there is one
    sample: Dataset  # training rows to look at: all, or the audited ones of a stream
    reports: dict[str, DataReport]  # of each split

    def longest_row_tokens(self, settings: Settings) -> int:
        """Of all splits; of a stream, of which only the first rows are known, as many as a row may have."""
        known = max(report.longest_row_tokens for report in self.reports.values())
        return settings.data.max_length or known if settings.data.streaming else known


def load_data(job: Job, vocabulary: Vocabulary, scratch_dir: Path) -> Data:
    """The job's data. Raises UserError with everything that is wrong with any of them."""
    settings, inputs = job.settings, job.inputs
    index, done = scratch_dir / "data.json", scratch_dir / "data.done"
    leaders = None
    if any(source.is_sharded for source in (*inputs.train, *inputs.validation)):
        if local_rank() == 0:
            done.unlink(missing_ok=True)  # after a restart in place, all hosts exchange again or none
        leaders = Leaders(job.environment.hosts, scratch_dir / "shards")  # which waits for all ranks

    def work() -> None:
        rejected_rows = job.environment.output_dir / "data" / REJECTED
        splits, problems = prepare_splits(inputs, vocabulary, settings, rejected_rows, leaders)
        if problems:
            raise UserError(*problems)
        index.write_text(json.dumps({name: split.to_json() for name, split in splits.items()}), encoding="utf-8")

    run_on_local_rank_zero(done, work)
    values = json.loads(index.read_text(encoding="utf-8"))
    splits = {name: Split.from_json(split) for name, split in values.items()}
    rows: dict[str, Any] = {
        name: concatenate_datasets(list(split.datasets().values())) for name, split in splits.items()
    }
    reports = {name: split.report for name, split in splits.items()}
    if settings.data.streaming:
        stream = open_stream(job, vocabulary, reports["train"].formats)
        return Data({**rows, "train": stream}, rows["train"], reports)
    if settings.data.train_weights:
        places = choose_rows(splits["train"].datasets(), settings.data.train_weights, settings.training.seed)
        rows["train"] = rows["train"].select(places)
    if settings.data.shuffle_dataset:
        rows["train"] = rows["train"].shuffle(seed=settings.training.seed, keep_in_memory=True)
    return Data(rows, rows["train"], reports)


def choose_rows(datasets: dict[str, Dataset], weights: dict[str, float], seed: int) -> Any:
    """The places of an epoch's rows: each source has its share of them, and none of its rows is left out.

    A source whose weight is large for its size repeats: whole times, and a random part.
    """
    for name, rows in datasets.items():
        if not len(rows):
            raise UserError(f"train_weights gives {name!r} a share and it has no rows left: leave the channel out.")
    per_row = {name: weights[name] / len(rows) for name, rows in datasets.items()}
    random = np.random.default_rng(seed)
    places, first = [], 0
    for name, rows in datasets.items():
        num_wanted = round(len(rows) * per_row[name] / min(per_row.values()))
        whole, part = divmod(num_wanted, len(rows))
        own = np.arange(first, first + len(rows))
        places += [np.tile(own, whole), np.sort(random.permutation(own)[:part])]
        first += len(rows)
    return np.concatenate(places)
