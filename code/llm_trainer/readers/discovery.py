# SPDX-License-Identifier: Apache-2.0
"""Discovery of the files in a channel that hold rows."""

import json
from fnmatch import fnmatch
from pathlib import Path

from llm_trainer.common.errors import UserError

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv")
SUFFIXES = (".parquet", ".arrow", *(suffix + codec for suffix in TEXT_SUFFIXES for codec in ("", ".gz", ".zst")))
# Files that Hugging Face keeps beside .arrow files, or about a data set. A state.json belongs to them only there.
NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "cache-*.arrow", "*.lock")
EXPECTED_BESIDE_ROWS = (*NOT_ROWS, "README*", "LICENSE*", "*.md", "_SUCCESS")


def find_files(path: Path, splits: tuple[str, ...] = ()) -> list[Path]:
    """Return the data files that a path names: the file itself, or those in the folder and below, sorted by path.

    Hidden files do not count. A saved DatasetDict gives the first of `splits` that it has. Raises UserError where it
    has none of them, and where a saved Dataset lacks one of its files.
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
    """Return the names of files in a folder and below that are not read, except for those nobody expects to be."""
    files = list_files(path) if path.is_dir() else []
    return [
        file.relative_to(path).as_posix()
        for file in files
        if not file.name.endswith(SUFFIXES) and not any(fnmatch(file.name, known) for known in EXPECTED_BESIDE_ROWS)
    ]


def list_files(folder: Path) -> list[Path]:
    """Return the files in a folder and below that are not hidden, sorted.

    A broken link is one of them: reading it will tell that data is missing.
    """
    return sorted(
        file
        for file in folder.rglob("*")
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def is_about_rows(file: Path) -> bool:
    """Tell whether a file describes a data set and holds no rows of it."""
    return is_state(file) or any(fnmatch(file.name, pattern) for pattern in NOT_ROWS)


def is_state(file: Path) -> bool:
    """Tell whether a file is the state.json of a folder that Dataset.save_to_disk wrote."""
    return file.name == "state.json" and (
        file.with_name("dataset_info.json").is_file() or any(file.parent.glob("*.arrow"))
    )


def choose_split(path: Path, splits: tuple[str, ...]) -> Path:
    """Return the folder to read: the path, or one split's folder of a saved DatasetDict. Raises UserError."""
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
    """Return the .arrow files of a saved Dataset. Raises UserError where one is missing."""
    shards = [state.with_name(name) for name in read_index(state)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{state} names {missing[0]}, which is not there: upload all files of the saved dataset.")
    return shards


def read_index(index: Path) -> list[str]:
    """Return the names of the splits or .arrow files that save_to_disk wrote. Raises UserError for other content."""
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        return saved["splits"] if "splits" in saved else [entry["filename"] for entry in saved["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not what save_to_disk writes ({error!r}): save the dataset again.") from error
