# SPDX-License-Identifier: Apache-2.0
"""Which files of a channel hold rows."""

import json
from fnmatch import fnmatch
from pathlib import Path

from llm_trainer.common.errors import UserError

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv")
SUFFIXES = (".parquet", ".arrow", *(suffix + codec for suffix in TEXT_SUFFIXES for codec in ("", ".gz", ".zst")))
# Files that Hugging Face keeps beside .arrow files, or about a data set. A state.json is one only beside such files.
NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "cache-*.arrow", "*.lock")
NOT_WORTH_TELLING = (*NOT_ROWS, "README*", "LICENSE*", "*.md", "_SUCCESS")


def find_files(path: Path, splits: tuple[str, ...] = ()) -> list[Path]:
    """The data files that a path means: itself, or those in the folder and below, by path. Hidden ones do not count.

    Of a saved DatasetDict only the first of the splits that is there. Raises UserError where none is, and where
    a saved Dataset lacks one of its files.
    """
    if path.is_file():
        return [path]
    found = list_files(choose_split(path, splits))
    shards = {file.parent: find_shards(file) for file in found if is_state(file)}
    return [
        file
        for file in found
        if file.name.endswith(SUFFIXES) and not is_about_rows(file) and file in shards.get(file.parent, [file])
    ]


def find_ignored_files(path: Path) -> list[str]:
    """Names of the files in a folder and below that are not read, but for those that nobody would expect to be."""
    files = list_files(path) if path.is_dir() else []
    return [
        file.relative_to(path).as_posix()
        for file in files
        if not file.name.endswith(SUFFIXES) and not any(fnmatch(file.name, known) for known in NOT_WORTH_TELLING)
    ]


def list_files(folder: Path) -> list[Path]:
    """Files that are not hidden. A link to nowhere is one, so that reading it tells that data is missing."""
    return sorted(
        file
        for file in folder.rglob("*")
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def is_about_rows(file: Path) -> bool:
    return is_state(file) or any(fnmatch(file.name, pattern) for pattern in NOT_ROWS)


def is_state(file: Path) -> bool:
    """Whether the file is the state.json of a folder that Dataset.save_to_disk wrote."""
    return file.name == "state.json" and (
        file.with_name("dataset_info.json").is_file() or any(file.parent.glob("*.arrow"))
    )


def choose_split(path: Path, splits: tuple[str, ...]) -> Path:
    """The folder to read: the path, or of a saved DatasetDict one split's."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        return path
    saved = read_index(index)
    for split in splits:
        if split in saved:
            return path / split
    raise UserError(
        f"{path} holds the splits {', '.join(saved)} and none that was looked for ({', '.join(splits) or 'none'}): "
        "give the folder of one split."
    )


def find_shards(state: Path) -> list[Path]:
    """The .arrow files of a saved Dataset."""
    shards = [state.with_name(name) for name in read_index(state)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{state} names {missing[0]}, which is not there: upload all files of the saved dataset.")
    return shards


def read_index(index: Path) -> list[str]:
    """The names of the splits or .arrow files that save_to_disk wrote."""
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        return saved["splits"] if "splits" in saved else [entry["filename"] for entry in saved["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not what save_to_disk writes ({error!r}): save the dataset again.") from error
