# SPDX-License-Identifier: Apache-2.0
"""Discovery of the files in a channel that hold rows, and of those that are passed over and why."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import check_access, explain_denied, find_barrier
from llm_trainer.readers.tar_shards import IMAGE_SUFFIXES

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")  # which are compressed within
SUFFIXES = (*TABLE_SUFFIXES, ".tar", *(suffix + codec for suffix in TEXT_SUFFIXES for codec in ("", ".gz", ".zst")))
# Files that Hugging Face keeps beside .arrow files, or about a data set. A state.json belongs to them only there.
NOT_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "cache-*.arrow", "*.lock")
EXPECTED_BESIDE_ROWS = (*NOT_ROWS, "README*", "LICENSE*", "*.md", "_SUCCESS")
# Files that other programs write beside the rows, named as rows are. Where nothing else is there they are rows.
COMPANIONS = {
    "template.json": "JumpStart's prompt template, which is not applied",
    "manifest.json": "a list of files",
    "croissant.json": "a description of the data",
    "dataset-metadata.json": "a description of the data",
}
HUB_SHARD = re.compile(
    r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.\w+"
)  # such as test-00000-of-00001.parquet
# Reasons why a file is passed over. The first three are as anybody expects; the others are told with the file's name.
HIDDEN, ABOUT_ROWS, IMAGE, NO_DATA_SUFFIX = "hidden", "about the data", "images of rows", "of no kind that is read"
UNFINISHED, TWICE, OTHER_SPLIT = (
    "in a folder that begins with _",
    "the same file under another name",
    "of another split",
)
EXPECTED_REASONS = (HIDDEN, ABOUT_ROWS, IMAGE)  # images that rows name, which are told where they lack


PassedOver = dict[Path, str]  # a file that is not read -> the reason


def describe_passed_over(passed_over: PassedOver) -> str:
    """Return how many files are passed over for each reason, such as `2 hidden, 1 about the data`."""
    counts = Counter(passed_over.values())
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))


def list_unexpected(passed_over: PassedOver, folder: Path) -> list[str]:
    """Return the name and the reason of each file that is passed over and that a user may have meant as data."""
    return [
        f"{file.relative_to(folder).as_posix()}{'' if reason == NO_DATA_SUFFIX else f' ({reason})'}"
        for file, reason in sorted(passed_over.items())
        if reason not in EXPECTED_REASONS
    ]


def find_files(path: Path, splits: tuple[str, ...] = ()) -> tuple[list[Path], PassedOver]:
    """Return the data files that a path names, sorted, and the files beside them that are passed over.

    The data files are the path itself if it is a file, or those in the folder and below.
    A saved DatasetDict, or the files of a Hub data set, give the first of `splits` that they have. Raises UserError
    where a DatasetDict has none of them, or a saved Dataset lacks one of its files. The same for each data file that
    is no regular file, or a link that leads out of the folder or nowhere.
    """
    check_access(path)
    if not path.is_dir():  # a file that is named itself may be a link to anywhere
        refuse_odd_files([path] if path.exists() else [], Path("/"))
        return [path] if path.exists() else [], {}
    folder = choose_split(path, splits)
    reasons = {file: find_reason(file, folder) for file in list_files(folder)}
    pass_over_left_overs(reasons)
    refuse_odd_files([file for file, reason in reasons.items() if not reason], folder)
    pass_over_doubles(reasons)
    pass_over_splits(reasons, splits)
    pass_over_companions(reasons)
    files = [file for file, reason in reasons.items() if not reason]
    return files, {file: reason for file, reason in reasons.items() if reason}


def find_reason(file: Path, folder: Path) -> str:
    """Return why a file is no data, by its name and place alone; empty where it is data."""
    *folders, name = file.relative_to(folder).parts
    if any(part.startswith(".") for part in (*folders, name)):
        return HIDDEN
    if any(is_unfinished(part) for part in folders):
        return UNFINISHED
    if is_about_rows(file) or any(fnmatch(name, known) for known in EXPECTED_BESIDE_ROWS):
        return ABOUT_ROWS
    if name.endswith(SUFFIXES):
        return ""
    return IMAGE if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES else NO_DATA_SUFFIX


def is_unfinished(folder: str) -> bool:
    """Tell whether a folder holds no data by the rule of Spark and Hive; a partition such as `_year=2024` does."""
    return folder.startswith("_") and "=" not in folder


def list_files(folder: Path) -> list[Path]:
    """Return what is in a folder and below and is no folder, sorted; links to folders are followed, each folder once.

    Raises UserError for a folder that cannot be read, or is a link that leads out of the folder.
    """
    found: list[Path] = []
    root = folder.resolve()
    seen = {root}
    for parent, names, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        check_access(Path(parent))  # one that cannot be entered is listed, and its files are not there
        found += [Path(parent, name) for name in files]
        names[:] = [name for name in names if is_followed(Path(parent, name), folder, root, seen)]
    return sorted(found)


def is_followed(path: Path, folder: Path, root: Path, seen: set[Path]) -> bool:
    """Tell whether a folder's files are listed: a link's, unless it is hidden or its folder was met before."""
    target = path.resolve()
    if path.is_symlink():
        if find_reason(path / "rows.json", folder):
            return False
        if not target.is_relative_to(root):
            raise UserError(explain_stray_link(path, target))
    is_new = target not in seen
    seen.add(target)
    return is_new


def refuse_folder(error: OSError) -> None:
    """Raise UserError for a folder that cannot be read, whose rows would be missing."""
    check_access(Path(error.filename))
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable, or remove it.") from error


def refuse_odd_files(files: list[Path], folder: Path) -> None:
    """Raise UserError with a sentence for each file that may not be read, or could keep a reader waiting."""
    root = folder.resolve()
    denied = [file for file in files if find_barrier(file)]
    if denied:
        raise UserError(*explain_denied(denied, folder))
    problems = [problem for file in files for problem in find_oddities(file, root)]
    if problems:
        raise UserError(*problems)


def find_oddities(file: Path, root: Path) -> Iterator[str]:
    """Yield a sentence where a file is a link to nowhere or out of the folder, or no regular file."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        kind = f"is a link to {os.readlink(file)!r}, which" if file.is_symlink() else "cannot be read and"
        yield f"{file} {kind} is not there ({error.strerror}): give the file itself, or remove it."
        return
    if not stat.S_ISREG(mode):
        yield f"{file} is no regular file but {name_kind(mode)}: give a file that can be read again, or remove it."
    elif file.is_symlink() and not file.resolve().is_relative_to(root):
        yield explain_stray_link(file, file.resolve())


def name_kind(mode: int) -> str:
    """Return the words for a kind of file that is neither regular nor a folder."""
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def explain_stray_link(link: Path, target: Path) -> str:
    """Return the sentence for the user about a link that leads out of its channel."""
    return f"{link} is a link to {target}, outside of its folder: put the data itself there, or mount that folder."


def pass_over_left_overs(reasons: dict[Path, str]) -> None:
    """Pass over .arrow files that the state.json beside them does not name. Raises UserError where one is missing."""
    states = [file for file, reason in reasons.items() if reason == ABOUT_ROWS and is_state(file)]
    shards = {state.parent: set(find_shards(state)) for state in states}
    for file, reason in reasons.items():
        if not reason and file not in shards.get(file.parent, {file}):
            reasons[file] = ABOUT_ROWS


def pass_over_doubles(reasons: dict[Path, str]) -> None:
    """Pass over links to files that are read anyway, whose rows would count twice."""
    files = [file for file, reason in reasons.items() if not reason]
    links = [file for file in files if file.is_symlink()]
    if not links:
        return
    read = {file.resolve() for file in files if file not in set(links)}
    for link in links:
        if link.resolve() in read:
            reasons[link] = TWICE
        read.add(link.resolve())


def pass_over_splits(reasons: dict[Path, str], splits: tuple[str, ...]) -> None:
    """Pass over the files of a Hub data set that belong to other splits than the first of `splits` that it has."""
    names = {file: HUB_SHARD.fullmatch(file.name) for file, reason in reasons.items() if not reason}
    own = {file: match["split"] for file, match in names.items() if match}
    wanted = next((split for split in splits if split in own.values()), None)
    for file, split in own.items():
        if wanted and split != wanted:
            reasons[file] = OTHER_SPLIT


def pass_over_companions(reasons: dict[Path, str]) -> None:
    """Pass over files that other programs write beside rows, where there are rows."""
    companions = [file for file, reason in reasons.items() if not reason and file.name in COMPANIONS]
    if len(companions) < sum(not reason for reason in reasons.values()):
        reasons |= {file: COMPANIONS[file.name] for file in companions}


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
    check_access(index)
    try:
        saved = read_json(index)
        names = saved["splits"] if "splits" in saved else [entry["filename"] for entry in saved["_data_files"]]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("names that are no plain names of files")
    except UnreadableTextError as error:
        raise UserError(f"{index} {error.reason}: save the dataset again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not what save_to_disk writes ({error!r}): save the dataset again.") from error
    return list(names)
