# SPDX-License-Identifier: Apache-2.0
"""Data of a job: prepared once a host, memory-mapped by every rank.

KTO estimates how far the model has moved on mismatched answers: each prompt with an answer to another one. TRL pairs
the prompts of a batch with each other's answers. Here each prompt has one for the whole run, drawn from all rows: the
same on any ranks and in any order of rows.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import write_verbatim
from llm_trainer.common.ranks import local_rank, run_on_local_rank_zero, world_size
from llm_trainer.config.environment import Environment
from llm_trainer.config.sections import DataSettings, TrainingSettings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.data.labels import Ids
from llm_trainer.data.report import REJECTED_ROWS, DataReport
from llm_trainer.data.shard_exchange import LocalRankZeroGroup
from llm_trainer.data.splits import Split, prepare_splits
from llm_trainer.data.streaming import build_preparers, open_stream
from llm_trainer.data.tokenize import build_lists
from llm_trainer.job.inputs import Inputs

OTHER_FEATURES = Features({"other_ids": List(Value("int32")), "other_labels": List(Value("int32"))})
ROWS_AT_ONCE = 1000
DRAW_SEED = 0  # not the job's, so that kept values of a reference serve jobs of other seeds

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The rows that a job trains and evaluates on: their `input_ids`, `labels` and, unless streamed, `length`."""

    splits: dict[str, Dataset | IterableDataset]  # train, and validation if there is one
    sample: Dataset  # training rows to look at: all of them, or the audited ones of a stream
    reports: dict[str, DataReport]  # split -> its report
    images: ImageProcessing | None = None  # what processes the images of rows; None where no row has any

    def list_datasets(self) -> list[Dataset]:
        """Return the splits that are no streams."""
        return [rows for rows in self.splits.values() if isinstance(rows, Dataset)]

    def find_longest_row_tokens(self, settings: DataSettings) -> int:
        """Return the tokens of the longest row of all splits.

        Only the first rows of a stream are known, so that `max_length` counts there.
        """
        known = max(report.longest_row_tokens for report in self.reports.values())
        return settings.max_length or known if settings.streaming else known


@dataclass(frozen=True)
class DataPlaces:
    """The places that a job's rows come from, and the folders that results of their preparation go to."""

    inputs: Inputs
    environment: Environment
    scratch_dir: Path

    @property
    def has_shards(self) -> bool:
        """True where the hosts have different files of a source."""
        return any(source.is_sharded for source in (*self.inputs.train, *self.inputs.validation))


def load_data(
    places: DataPlaces, vocabulary: Vocabulary, settings: DataSettings, training_settings: TrainingSettings
) -> Data:
    """Prepare the job's data once a host, and return it memory-mapped for this rank.

    Raises UserError with everything that is wrong with any of them.
    """
    splits = share_splits(places, vocabulary, settings)
    rows: dict[str, Any] = {name: join_sources(split.open_datasets(), settings) for name, split in splits.items()}
    if settings.is_judged:
        rows = {name: add_mismatched(own, settings, places.scratch_dir / name) for name, own in rows.items()}
    reports = {name: split.report for name, split in splits.items()}
    images = vocabulary.images if any(report.num_images for report in reports.values()) else None
    if vocabulary.images is not None and images is None:  # texts alone, which are trained on as ever
        rows = {name: drop_pictures(own) for name, own in rows.items()}
    if settings.streaming:
        preparers = build_preparers(vocabulary, settings, reports["train"].formats)
        stream = open_stream(places.inputs.train, preparers, settings, training_settings, places.environment)
        return Data({**rows, "train": stream}, rows["train"], reports)
    seed = training_settings.seed
    rows["train"] = choose_epoch(rows["train"], splits["train"], settings, seed)
    check_full_batch(len(rows["train"]), "rows", training_settings, world_size())
    if settings.shuffle_dataset:
        rows["train"] = rows["train"].shuffle(seed=seed, keep_in_memory=True)
    return Data(rows, rows["train"], reports, images)


def drop_pictures(rows: Dataset) -> Dataset:
    """Return rows of texts without the column of images, which is empty."""
    return rows.remove_columns("pictures") if "pictures" in rows.column_names else rows


def share_splits(places: DataPlaces, vocabulary: Vocabulary, settings: DataSettings) -> dict[str, Split]:
    """Prepare the splits on this host's first rank, and return them on every rank.

    Raises UserError with everything that is wrong with any of them.
    """
    index, done = places.scratch_dir / "data.json", places.scratch_dir / "data.done"
    group = None
    if places.has_shards:
        if local_rank() == 0:
            done.unlink(missing_ok=True)  # after a restart in place, all hosts exchange again or none does
        group = LocalRankZeroGroup(places.environment.hosts, places.scratch_dir / "shards")  # waits for all ranks

    def prepare() -> None:
        rejected_rows = places.environment.output_dir / "data" / REJECTED_ROWS
        splits, problems = prepare_splits(places.inputs, vocabulary, settings, rejected_rows, group)
        if problems:
            raise UserError(*problems)
        write_verbatim(index, json.dumps({name: split.to_json() for name, split in splits.items()}))

    run_on_local_rank_zero(done, prepare)
    values = json.loads(index.read_text(encoding="utf-8"))
    return {name: Split.from_json(split) for name, split in values.items()}


def open_epoch(split: Split, settings: DataSettings, seed: int) -> Dataset:
    """Return the training rows of an epoch, in the order of their sources.

    Raises UserError where `train_weights` names a source without rows.
    """
    return choose_epoch(join_sources(split.open_datasets(), settings), split, settings, seed)


def choose_epoch(rows: Dataset, split: Split, settings: DataSettings, seed: int) -> Dataset:
    """Return those of a split's joined rows that make an epoch. Raises UserError as `open_epoch` does."""
    if not settings.train_weights:
        return rows
    return rows.select(choose_rows(split.open_datasets(), settings.train_weights, seed))


def join_sources(datasets: dict[str, Dataset], settings: DataSettings) -> Dataset:
    """Return the rows of all sources. Rows of answers have a number, by which a reference's values are found again."""
    rows = concatenate_datasets(list(datasets.values()))
    return rows.add_column("row", np.arange(len(rows), dtype=np.int32)) if settings.has_answers else rows


def check_full_batch(num_rows: int, unit: str, settings: TrainingSettings, num_devices: int) -> None:
    """Raise UserError where `dataloader_drop_last` leaves nothing to train on: it drops what fills no batch.

    `unit` is the word for the rows, which packing may have put into sequences.
    """
    per_device = settings.per_device_train_batch_size
    if settings.dataloader_drop_last and num_rows < per_device * num_devices:
        raise UserError(
            f"dataloader_drop_last=true drops all training data: {num_rows} {unit} fill no batch of "
            f"{per_device * num_devices} (per_device_train_batch_size={per_device} x {num_devices} devices); leave it "
            "out, lower per_device_train_batch_size, or give more rows."
        )


def choose_rows(datasets: dict[str, Dataset], weights: dict[str, float], seed: int) -> npt.NDArray[np.int64]:
    """Return the indices of an epoch's rows: each source has its share of them, and none of its rows is left out.

    A source whose weight is large for its size repeats: whole times, and a random part. Raises UserError where a
    source has no rows.
    """
    for name, rows in datasets.items():
        if not len(rows):
            raise UserError(f"train_weights gives {name!r} a share and it has no rows left: leave the channel out.")
    per_row = {name: weights[name] / len(rows) for name, rows in datasets.items()}
    generator = np.random.default_rng(seed)
    indices, first = [], 0
    for name, rows in datasets.items():
        num_wanted = round(len(rows) * per_row[name] / min(per_row.values()))
        whole, part = divmod(num_wanted, len(rows))
        own = np.arange(first, first + len(rows))
        indices += [np.tile(own, whole), np.sort(generator.permutation(own)[:part])]
        first += len(rows)
    return np.concatenate(indices)


def add_mismatched(rows: Dataset, settings: DataSettings, folder: Path) -> Dataset:
    """Return the rows with a mismatched answer each, memory-mapped. One process a host writes them into the folder."""
    arrow = folder / "mismatched.arrow"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(path=str(arrow), features=OTHER_FEATURES) as writer:
            for table in build_tables(rows, settings):
                writer.write_table(table)
            writer.finalize()

    run_on_local_rank_zero(folder.with_suffix(".mismatched"), write)
    return concatenate_datasets([rows, Dataset.from_file(str(arrow))], axis=1)


def build_tables(rows: Dataset, settings: DataSettings) -> Iterator[pa.Table]:
    """Yield the mismatched answers of the rows, so many rows at once."""
    tokens = rows.select_columns(["input_ids", "labels"]).with_format("numpy")
    others = tokens.select(draw_others(len(rows)))
    for first in range(0, len(rows), ROWS_AT_ONCE):
        places = range(first, min(first + ROWS_AT_ONCE, len(rows)))
        made = [mismatch(tokens[place], others[place], settings) for place in places]
        columns = zip(*made, strict=True)
        yield pa.table(
            {name: build_lists([*own], measure(own)) for name, own in zip(OTHER_FEATURES, columns, strict=True)}
        )


def draw_others(num_rows: int) -> npt.NDArray[np.int64]:
    """Return for each row the place of another one, whose answer it gets; each answer comes once."""
    order = np.random.default_rng(DRAW_SEED).permutation(num_rows)
    others = np.empty_like(order)
    others[order] = np.roll(order, 1)
    return others


def mismatch(row: Row, other: Row, settings: DataSettings) -> tuple[Ids, Ids]:
    """Return ids and labels of a row's prompt with another row's answer, cut as rows are."""
    prompt = row["input_ids"][: find_answer(row)]
    answer = slice(find_answer(other), None)
    ids = np.concatenate([prompt, other["input_ids"][answer]])
    labels = np.concatenate([np.full_like(prompt, IGNORED), other["labels"][answer]])
    limit = settings.max_length
    kept = slice(limit) if settings.truncation_mode != "keep_end" or limit is None else slice(-limit, None)
    return ids[kept], labels[kept]


def find_answer(row: Row) -> int:
    """Return the place of a row's first token that is trained on."""
    return int(np.argmax(row["labels"] != IGNORED))


def measure(parts: tuple[Ids, ...]) -> Ids:
    """Return the length of each part."""
    return np.array([len(part) for part in parts], dtype=np.int32)
