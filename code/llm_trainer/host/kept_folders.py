# SPDX-License-Identifier: Apache-2.0
"""Results that are kept in this user's cache from job to job, each in a sealed folder that is named by its content."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.common.activity_notes import note_activity
from llm_trainer.common.files import remove_path
from llm_trainer.host.sealed_folders import (
    find_damage,
    hold_folder,
    make_private_folder,
    remove_oldest,
    seal_folder,
    sync,
)

MAX_SHARE_OF_DISK = 0.2  # what the kept results of a kind may take; the oldest go first


def find_cache_dir() -> Path:
    """Return the folder for all caches of this package, which the launcher chooses."""
    return Path(os.environ["LLM_TRAINER_CACHE"])


def find_folder(kind: str, key: str, content: str) -> Path:
    """Return the folder of a key, held until this process ends; it is not there where the cache has nothing sound.

    `content` names what such a folder holds, for a message.
    """
    folder = make_private_folder(find_cache_dir() / kind) / key
    hold_folder(folder)
    if folder.is_symlink() or folder.exists():
        if damage := find_damage(folder, key):
            log.warning(f"{content} kept in {folder} are made anew: the folder {damage}.", every_rank=True)
            remove_path(folder)
        else:
            os.utime(folder)  # the time of its last use
    return folder


def write_folder(folder: Path, write: Callable[[Path], None], activity: str) -> Path:
    """Have `write` fill a folder, which is whole once it has its name, and return it."""
    remove_oldest(folder.parent, int(shutil.disk_usage(folder.parent).total * MAX_SHARE_OF_DISK))
    unfinished = make_unfinished(folder.parent)
    try:
        with note_activity(activity, find_cache_dir().parent):
            write(unfinished)
            seal_folder(unfinished, folder.name)
        publish_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def make_unfinished(parent: Path) -> Path:
    """Return a new folder that is held. Another job may take one for a leftover, and remove it, before it is."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".", dir=parent))
        hold_folder(folder)
        if folder.is_dir():
            return folder


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Give a finished folder its name.

    Where another job or host with the same disk was first, its folder stays: it has the same content.
    """
    try:
        unfinished.rename(folder)
        sync(folder.parent)
    except OSError:
        if not folder.is_dir():
            raise
        hold_folder(folder)
