# SPDX-License-Identifier: Apache-2.0
"""One chosen reward: a built-in one, or FILE.py:NAME, a function in a file of a channel."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import check_access, is_inner_path
from llm_trainer.rewards.options import OPTIONS, suggest

FILE_CHANNELS = ("rewards", "config")  # where a file is looked for, in this order
FORM = "a built-in reward, or FILE.py:NAME for a function in a file of channel 'rewards' or 'config'"


@dataclass(frozen=True)
class Choice:
    """A reward as the user names it, and what its name stands for."""

    entry: str
    name: str  # of the built-in, or of the function
    options: Mapping[str, Any]
    file: Path | None = None  # None for a built-in one

    def describe_content(self) -> str:
        """Return the entry. A function of the user has the digest of its file behind it."""
        return f"{self.entry} {hashlib.sha256(self.file.read_bytes()).hexdigest()[:12]}" if self.file else self.entry


def parse_choice(entry: str, options: Mapping[str, Any], channels: Mapping[str, Path]) -> Choice:
    """Return the reward that an entry of `reward_functions` names. A schema's file stays a name.

    Raises UserError for an unknown name, and a file that is not in a channel.
    """
    if entry in OPTIONS:
        return Choice(entry, entry, options)
    file, colon, name = entry.rpartition(":")
    key = f"reward_functions={entry!r}"
    if entry.endswith(".py"):
        raise UserError(f"{key} names no function of the file: write {entry}:NAME.")
    if not colon:
        raise UserError(f"{key} has to be {FORM}: {suggest(entry, OPTIONS)}")
    if not (file.endswith(".py") and name.isidentifier()):
        raise UserError(f"{key} has to be {FORM}: write it so, such as rewards.py:score.")
    return Choice(entry, name, options, find_file(file, channels, key))


def read_schema(choice: Choice, channels: Mapping[str, Path]) -> Choice:
    """Return the choice with the schema itself where its option names a file. Raises UserError where none is there."""
    schema = choice.options.get("schema")
    if choice.file or not isinstance(schema, str):
        return choice
    key = f"reward_options: {choice.name}: schema={schema!r}"
    try:
        value = read_json(find_file(schema, channels, key))
    except UnreadableTextError as error:
        raise UserError(f"{key} {error.reason}: write it as one JSON object.") from error
    if not isinstance(value, dict):
        raise UserError(f"{key} holds a JSON {type(value).__name__}: write it as one JSON object.")
    return replace(choice, options={**choice.options, "schema": value})


def find_file(name: str, channels: Mapping[str, Path], key: str) -> Path:
    """Return the file of a name: a path in channel `rewards` or `config`, or an absolute one in any channel.

    `key` begins the sentence of an error. Raises UserError where it is not there, or leads out of its channel.
    """
    if os.path.isabs(name):
        candidates = [(folder, Path(name)) for folder in channels.values() if Path(name).is_relative_to(folder)]
        if not candidates:
            raise UserError(
                f"{key} lies in no channel: put {Path(name).name} into channel 'rewards' and name it there."
            )
    elif not is_inner_path(name):
        raise UserError(f"{key} is no path within a channel: write it without '.' and '..', from the channel's folder.")
    else:
        folders = [channels[channel] for channel in FILE_CHANNELS if channel in channels]
        candidates = [(folder, folder / name) for folder in folders]
    for folder, file in candidates:
        check_access(file)
        if file.is_file():
            if not file.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{key} is a link out of its channel: put the file itself there.")
            return file
    raise UserError(f"{key} names a file that is not there: {describe_places(name, channels)}")


def describe_places(name: str, channels: Mapping[str, Path]) -> str:
    """Return the end of a sentence on a missing file: the channels that were searched, and what lies in them."""
    folders = [channels[channel] for channel in FILE_CHANNELS if channel in channels]
    if os.path.isabs(name) or not folders:
        return f"give {Path(name).name} as a file of channel 'rewards'."
    found = sorted(file.name for folder in folders for file in folder.glob(f"*{Path(name).suffix}"))
    beside = f", which {'has' if len(folders) == 1 else 'have'} {', '.join(found[:5])}" if found else ""
    return f"put it into {' or '.join(map(str, folders))}{beside}."
