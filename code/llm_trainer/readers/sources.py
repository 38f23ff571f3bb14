# SPDX-License-Identifier: Apache-2.0
"""Where a job's rows come from: channels, a path, or a data set of the Hugging Face Hub. No torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import compute_digest
from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import Settings, show_value
from llm_trainer.readers.discovery import find_files, find_ignored
from llm_trainer.readers.files import read_chunks
from llm_trainer.readers.rows import Chunk

TRAIN_CHANNEL = re.compile(r"train(ing)?([._-].+)?")
VALIDATION_CHANNEL = re.compile(r"val(idation)?([._-].+)?")
HUB_DATA_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OTHER_CHANNELS = ("model", "config", "code", "sm_drivers", "sourcecode")  # the last three are SageMaker's SDKs' own
KINDS = ".json, .jsonl, .parquet, .csv or .arrow"


@dataclass(frozen=True)
class FileSource:
    """Rows of one format."""

    name: str  # of the channel, or the path or id as it is given
    folder: Path  # of the files
    files: tuple[Path, ...]
    prefix: str = ""  # of the files' names in messages, where there are several sources
    is_sharded: bool = False  # the other hosts have other files of it, and this one may have none

    def describe(self) -> str:
        files = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        return f"{self.name}: {self.folder}, {files}{', a shard of this host alone' if self.is_sharded else ''}"

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and digest of each file."""
        return [
            {"name": name, "bytes": file.stat().st_size, "sha256": compute_digest(file)} for name, file in self.named()
        ]

    def read(self, max_rows: int) -> Iterator[Iterator[Chunk]]:
        """The chunks of each file, which raise DamagedFile where it cannot be read on."""
        for name, file in self.named():
            yield read_chunks(file, name, max_rows)

    def named(self) -> Iterator[tuple[str, Path]]:
        for file in self.files:
            yield self.prefix + file.relative_to(self.folder).as_posix(), file


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hugging Face Hub."""

    name: str  # the data set's id
    config: str | None
    split: str
    is_sharded: bool = False  # every host downloads it whole

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.name, self.config, self.split)))

    def describe(self) -> str:
        return f"split {self.split!r} of {self.name} from the Hugging Face Hub"

    def fingerprint(self) -> list[dict[str, Any]]:
        rows = load_hub_data(self.name, self.config, self.split)
        return [{"name": self.title, "bytes": rows.size_in_bytes, "sha256": rows._fingerprint}]

    def read(self, max_rows: int) -> Iterator[Iterator[Chunk]]:
        yield self.read_chunks(max_rows)

    def read_chunks(self, max_rows: int) -> Iterator[Chunk]:
        first = 1
        for rows in load_hub_data(self.name, self.config, self.split).iter(max_rows):
            columns = list(rows.values())
            own = [dict(zip(rows, values, strict=True)) for values in zip(*columns, strict=True)]
            yield Chunk(f"{self.name} {self.split}", list(range(first, first + len(own))), own)
            first += len(own)


@cache
def load_hub_data(name: str, config: str | None, split: str) -> Any:
    """The split, downloaded unless it was before. Raises UserError when the Hub does not have or give it."""
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


def find_train(settings: Settings, environment: Environment) -> tuple[list[Source], list[str]]:
    """The sources of the training data, and a sentence for each that is missing or empty."""
    path = settings.data.train_dataset_path
    if path:
        sources, problems = find_at_path(
            path, "train_dataset_path", settings.data.dataset_train_split, settings, environment
        )
        return sources, problems + list(check_weights(settings, [path]))
    channels = [name for name in environment.channels if TRAIN_CHANNEL.fullmatch(name)]
    if not channels:
        return [], [f"Training data is missing: give a channel 'train' with {KINDS} files, or set train_dataset_path."]
    sources, problems = find_in_channels(channels, ("train",), environment)
    return sources, problems + list(check_weights(settings, channels))


def find_validation(settings: Settings, environment: Environment) -> tuple[list[Source], list[str]]:
    """The same of the validation data, of which there may be none."""
    path = settings.data.val_dataset_path
    if path:
        return find_at_path(path, "val_dataset_path", settings.data.dataset_test_split, settings, environment)
    channels = [name for name in environment.channels if VALIDATION_CHANNEL.fullmatch(name)]
    return find_in_channels(channels, ("validation", "val", "test"), environment)


def find_at_path(
    path: str, setting: str, split: str, settings: Settings, environment: Environment
) -> tuple[list[Source], list[str]]:
    if not Path(path).exists() and HUB_DATA_ID.fullmatch(path):
        return [HubSource(path, settings.data.dataset_config, split)], []
    return find_files_at(Path(path), f"{setting}={path!r}", path, "", (split,), environment)


def find_in_channels(
    channels: list[str], splits: tuple[str, ...], environment: Environment
) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    problems: list[str] = []
    for channel in channels:
        prefix = f"{channel}/" if len(channels) > 1 else ""
        folder = environment.channels[channel]
        found, missing = find_files_at(folder, f"Channel {channel!r}", channel, prefix, splits, environment)
        sources += found
        problems += missing
    return sources, problems


def find_files_at(
    place: Path, what: str, name: str, prefix: str, splits: tuple[str, ...], environment: Environment
) -> tuple[list[Source], list[str]]:
    """The source of a file or a folder; `what` is what a message calls it."""
    is_sharded = any(place.is_relative_to(environment.channels[shard]) for shard in environment.sharded_channels)
    if not place.exists() and not is_sharded:
        fix = "check the path and the channel's S3 prefix."
        return [], [f"{what} does not exist in the container ({place}): {fix}"]
    try:
        files = find_files(place, splits)
    except UserError as error:
        return [], list(error.problems)
    if not files and not is_sharded:
        found = sorted(entry.name for entry in place.iterdir())[:5] if place.is_dir() else []
        return [], [
            f"{what} has no {KINDS} file in {place} (found: {', '.join(found) or 'nothing'}): put the data there."
        ]
    folder = place.parent if place.is_file() else place
    return [FileSource(name, folder, tuple(files), prefix, is_sharded)], []


def check_weights(settings: Settings, channels: list[str]) -> Iterator[str]:
    weights = settings.data.train_weights
    if weights is not None and sorted(weights) != sorted(channels):
        yield (
            f"train_weights={show_value(weights)} must name each training channel once, and there are "
            f"{', '.join(channels)}: name them, or leave it out to take each row once."
        )


def find_unread(source: Source) -> list[str]:
    """Names of files beside the data that nobody reads, so that none is missed without a word."""
    return find_ignored(source.folder) if isinstance(source, FileSource) else []


def find_unused(environment: Environment) -> list[str]:
    """Channels whose name says nothing to us, a misspelt `vaildation` say."""
    return [
        name
        for name in environment.channels
        if not (TRAIN_CHANNEL.fullmatch(name) or VALIDATION_CHANNEL.fullmatch(name) or name in OTHER_CHANNELS)
    ]
