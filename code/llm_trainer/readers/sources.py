# SPDX-License-Identifier: Apache-2.0
"""Sources of a job's rows: the files of channels or of a path, or a data set of the Hugging Face Hub."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import compute_digest, find_barrier, find_denial
from llm_trainer.config.environment import WHOLE_CHANNELS, Environment
from llm_trainer.config.schema import show_value
from llm_trainer.config.sections import ADDRESS, DataSettings
from llm_trainer.readers.discovery import PassedOver, describe_passed_over, find_files, list_unexpected
from llm_trainer.readers.files import MAX_BYTES, read_chunks
from llm_trainer.readers.rows import Chunk
from llm_trainer.readers.tables import read_table, split_batch

TRAIN_CHANNEL = re.compile(r"train(ing)?([._-].+)?")
VALIDATION_CHANNEL = re.compile(r"val(idation)?([._-].+)?")
HUB_DATA_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SDK_CHANNELS = ("code", "sm_drivers", "sourcecode")  # SageMaker's SDKs make them
OTHER_CHANNELS = (*WHOLE_CHANNELS, *SDK_CHANNELS)
KINDS = ".json, .jsonl, .csv, .tsv, .parquet, .arrow, .feather or .tar"


@dataclass(frozen=True)
class FileSource:
    """Files whose rows all have one format."""

    name: str  # the channel's name, or the path as it is given
    folder: Path  # the folder that the files' names are relative to
    files: tuple[Path, ...]
    prefix: str = ""  # stands before the files' names in messages, where there are several sources
    is_sharded: bool = False  # whether other hosts have other files of it; this host may then have none
    passed_over: PassedOver = field(default_factory=dict)  # files beside them that are not read

    def describe(self) -> str:
        """Return a line that names the source, its folder and the number of its files, read and passed over."""
        files = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        if self.passed_over:
            files += f" (passed over: {describe_passed_over(self.passed_over)})"
        return f"{self.name}: {self.folder}, {files}{', a shard of this host alone' if self.is_sharded else ''}"

    def identify_files(self) -> list[dict[str, Any]]:
        """Return name, size in bytes and SHA-256 digest of each file."""
        return [
            {"name": name, "bytes": file.stat().st_size, "sha256": compute_digest(file)}
            for name, file in self.name_files()
        ]

    def read_parts(self, max_rows: int) -> Iterator[Iterator[Chunk]]:
        """Yield an iterator of chunks of at most `max_rows` rows for each file.

        It raises DamagedFile, after the rows before the damage, where the file cannot be read to its end.
        """
        for name, file in self.name_files():
            yield read_chunks(file, name, max_rows)

    def name_files(self) -> Iterator[tuple[str, Path]]:
        """Yield the name of each file in messages and reports, with its path."""
        for file in self.files:
            yield self.prefix + file.relative_to(self.folder).as_posix(), file


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hugging Face Hub."""

    name: str  # the data set's id
    config: str | None
    split: str
    is_sharded: bool = False  # always false, because every host downloads the whole split

    @property
    def title(self) -> str:
        """The name of the split in reports."""
        return " ".join(filter(None, (self.name, self.config, self.split)))

    def describe(self) -> str:
        """Return a line that names the source."""
        return f"split {self.split!r} of {self.name} from the Hugging Face Hub"

    def identify_files(self) -> list[dict[str, Any]]:
        """Return name, size in bytes and the fingerprint by `datasets` of the split, as if it was one file."""
        rows = load_hub_data(self.name, self.config, self.split)
        return [{"name": self.title, "bytes": rows.size_in_bytes, "sha256": rows._fingerprint}]

    def read_parts(self, max_rows: int) -> Iterator[Iterator[Chunk]]:
        """Yield one iterator of chunks of at most `max_rows` rows."""
        yield self.read_chunks(max_rows)

    def read_chunks(self, max_rows: int) -> Iterator[Chunk]:
        """Yield the split's rows in order, read as those of an Arrow file are.

        A chunk has at most `max_rows` rows and MAX_BYTES, or one row.
        """
        first, name = 1, f"{self.name} {self.split}"
        tables = load_hub_data(self.name, self.config, self.split).with_format("arrow").iter(max_rows)
        for batch in (batch for table in tables for batch in table.to_batches()):
            for part in split_batch(batch, max_rows, MAX_BYTES):
                rows = [row for _, row, _ in read_table(iter([part]), name, max_rows, MAX_BYTES)]
                yield Chunk(name, list(range(first, first + len(rows))), rows)
                first += len(rows)


@cache
def load_hub_data(name: str, config: str | None, split: str) -> Any:
    """Return a split of a Hub data set, downloaded unless the cache has it.

    Raises UserError where the Hub does not have the data set, or does not give access to it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, name=config, split=split)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"{name!r} is neither a file or folder in the container, nor can it be read from the Hugging Face Hub "
            f"({quote_error(error)}): check the path, the id, dataset_config and the split; a private one needs "
            "HF_TOKEN."
        ) from error


Source = FileSource | HubSource


@dataclass(frozen=True)
class Place:
    """A file or folder that a setting or a channel names as data."""

    path: Path
    name: str  # becomes the source's name
    label: str  # names the place in a message
    prefix: str = ""  # stands before the files' names in messages, where there are several sources


def find_train_sources(settings: DataSettings, environment: Environment) -> tuple[list[Source], list[str]]:
    """Return the sources of the training data, and a sentence for each that is missing or empty."""
    path = settings.train_dataset_path
    if path:
        label = f"train_dataset_path={path!r}"
        sources, problems = find_at_path(path, label, settings.dataset_train_split, settings, environment)
        return sources, problems + list(check_train_weights(settings, [path]))
    channels = [name for name in environment.channels if TRAIN_CHANNEL.fullmatch(name)]
    if not channels:
        return [], [f"Training data is missing: give a channel 'train' with {KINDS} files, or set train_dataset_path."]
    sources, problems = find_in_channels(channels, ("train",), environment)
    return sources, problems + list(check_train_weights(settings, channels))


def find_validation_sources(settings: DataSettings, environment: Environment) -> tuple[list[Source], list[str]]:
    """Return the sources of the validation data, and a sentence for each that is missing or empty.

    A job without validation data has no sources and no sentences.
    """
    path = settings.val_dataset_path
    if path:
        label = f"val_dataset_path={path!r}"
        return find_at_path(path, label, settings.dataset_test_split, settings, environment)
    channels = [name for name in environment.channels if VALIDATION_CHANNEL.fullmatch(name)]
    return find_in_channels(channels, ("validation", "val", "test"), environment)


def find_at_path(
    path: str, label: str, split: str, settings: DataSettings, environment: Environment
) -> tuple[list[Source], list[str]]:
    """Return the source at a path, or on the Hub where no such path exists, and a sentence for each problem."""
    if ADDRESS.match(path):
        text = (
            "is an address, and data are read from files: give its S3 prefix as a channel; outside SageMaker mount it "
            "(Mountpoint for Amazon S3) or copy it (aws s3 sync), and give the folder."
        )
        return [], [f"{label} {text}"]
    if HUB_DATA_ID.fullmatch(path) and not os.path.exists(path) and find_barrier(Path(path)) is None:
        return [HubSource(path, settings.dataset_config, split)], []
    return find_files_at(Place(Path(path), path, label), (split,), environment)


def find_in_channels(
    channels: list[str], splits: tuple[str, ...], environment: Environment
) -> tuple[list[Source], list[str]]:
    """Return the source of each channel, and a sentence for each that is missing or empty."""
    sources: list[Source] = []
    problems: list[str] = []
    for channel in channels:
        prefix = f"{channel}/" if len(channels) > 1 else ""
        place = Place(environment.channels[channel], channel, f"Channel {channel!r}", prefix)
        found, missing = find_files_at(place, splits, environment)
        sources += found
        problems += missing
    return sources, problems


def find_files_at(place: Place, splits: tuple[str, ...], environment: Environment) -> tuple[list[Source], list[str]]:
    """Return the source of a file or a folder, and a sentence where it is missing, empty or incomplete.

    The folder of a sharded channel may be missing or empty: another host has the files.
    """
    path = place.path
    is_sharded = any(path.is_relative_to(environment.channels[shard]) for shard in environment.sharded_channels)
    if denied := list(find_denial(path)):
        return [], denied
    if not path.exists() and not is_sharded:
        fix = "check the path and the channel's S3 prefix."
        return [], [f"{place.label} does not exist in the container ({path}): {fix}"]
    try:
        files, passed_over = find_files(path, splits)
    except UserError as error:
        return [], list(error.problems)
    if not files and not is_sharded:
        found = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else []
        return [], [
            f"{place.label} has no {KINDS} file in {path} (found: {', '.join(found) or 'nothing'}): put the data there."
        ]
    folder = path.parent if path.is_file() else path
    return [FileSource(place.name, folder, tuple(files), place.prefix, is_sharded, passed_over)], []


def check_train_weights(settings: DataSettings, channels: list[str]) -> Iterator[str]:
    """Yield a sentence where `train_weights` does not name each training channel once."""
    weights = settings.train_weights
    if weights is not None and sorted(weights) != sorted(channels):
        yield (
            f"train_weights={show_value(weights)} must name each training channel once, and there are "
            f"{', '.join(channels)}: name them, or leave it out to take each row once."
        )


def find_unread_files(source: Source) -> list[str]:
    """Return the names of files beside the data that are not read and may have been meant, for a warning."""
    return list_unexpected(source.passed_over, source.folder) if isinstance(source, FileSource) else []


def find_unused_channels(environment: Environment) -> list[str]:
    """Return the channels whose name has no meaning here, such as a misspelt `vaildation`."""
    return [
        name
        for name in environment.channels
        if not (TRAIN_CHANNEL.fullmatch(name) or VALIDATION_CHANNEL.fullmatch(name) or name in OTHER_CHANNELS)
    ]
