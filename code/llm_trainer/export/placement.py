# SPDX-License-Identifier: Apache-2.0
"""The model folder while a result goes in: at no moment does it hold half a result that looks like a whole one.

Files wait in a hidden folder beside their places, and come one by one, by renaming. The model's or adapter's config
comes last of what makes a result, and goes first: no library loads a folder without it. The manifest comes first and
goes last, so that the next job in the same tree finds what a killed one left.
"""

import contextlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from llm_trainer.common import log
from llm_trainer.common.files import remove_leftover
from llm_trainer.journal.manifest import MANIFEST
from llm_trainer.serving.lmi_files import ENVIRONMENT, PROPERTIES

STAGING = ".llm-trainer-export"
KEPT = "not-of-the-result-"  # a folder for files of others
CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class ModelFolder:
    """The folder that SageMaker uploads. Files in it are named by their path there."""

    path: Path
    staging: Path  # hidden in it, for files that are not in their places

    @classmethod
    def open(cls, path: Path) -> Self:
        """Make the hidden folder. Remove those that killed jobs left, as far as they can be removed."""
        for left in path.glob(f"{STAGING}*"):
            remove_leftover(left)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, Path(tempfile.mkdtemp(prefix=STAGING, dir=path)))
        folder.new.mkdir()
        return folder

    @property
    def new(self) -> Path:
        """The folder for files that wait for their places. It is laid out like the model folder."""
        return self.staging / "new"

    @property
    def earlier(self) -> Path:
        """The folder for the earlier result, which comes back where the new one fails its proof."""
        return self.staging / "earlier"

    def forget_earlier(self) -> None:
        """Remove the earlier result for good."""
        remove_leftover(self.earlier)

    def close(self) -> None:
        """Remove the hidden folder, and what is in it."""
        remove_leftover(self.staging)

    def place(self, names: Iterable[str], earlier: Iterable[str]) -> None:
        """Put the waiting files in place, once the earlier ones and what is in the way of `names` have left theirs.

        A file or folder that came into the way during the training, and is no earlier job's, is kept beside the result.
        """
        earlier = set(earlier)
        obstacles = self.find_obstacles(names) - earlier
        foreign = {name for name in obstacles if name != MANIFEST and not (self.path / name).is_symlink()}
        move_files(reversed(order_files({*earlier, *obstacles} - foreign)), self.path, self.earlier)
        if foreign:
            kept = Path(tempfile.mkdtemp(prefix=KEPT, dir=self.path))
            move_files(order_files(foreign), self.path, kept)
            log.warning(f"{', '.join(sorted(foreign))} would be in the way of the result: moved to {kept}.")
        self.add_files()

    def add_files(self) -> None:
        """Put the waiting files in place, beside those that are there or over them."""
        for path in self.new.rglob("*"):  # safetensors writes files that only the container's root can read
            with contextlib.suppress(OSError):  # some file systems have no modes
                path.chmod(0o755 if path.is_dir() else 0o644)
        move_files(order_files(list_files(self.new)), self.new, self.path)

    def take_back(self, names: Iterable[str]) -> Path:
        """Move files out of their places, and the earlier result back. Return the folder that holds the files now."""
        removed = self.staging / "removed"
        move_files(reversed(order_files(name for name in names if is_there(self.path / name))), self.path, removed)
        move_files(order_files(list_files(self.earlier)), self.earlier, self.path)
        return removed

    def find_obstacles(self, names: Iterable[str]) -> set[str]:
        """Return what has the name of a file that is to come, or is no folder where the file needs one."""
        obstacles: set[str] = set()
        for name in names:
            folders = [self.path / folder for folder in PurePosixPath(name).parents if folder.name]
            blocked = [folder for folder in folders if folder.is_symlink() or folder.is_file()]
            if blocked or is_there(self.path / name):
                obstacles.add((blocked or [self.path / name])[-1].relative_to(self.path).as_posix())
        return obstacles


def is_there(path: Path) -> bool:
    """Tell whether a path is taken, be it by a link to nowhere."""
    return path.exists() or path.is_symlink()


def list_files(folder: Path) -> list[str]:
    """List the files and links below a folder, by their paths there."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()]


def order_files(names: Iterable[str]) -> list[str]:
    """Return the names of files in the order in which they come: manifest, weights, config, and a server's settings.

    A server that found its settings without the rest would serve the base alone.
    """
    ranks = {MANIFEST: 0, **dict.fromkeys(CONFIGS, 2), PROPERTIES: 3, ENVIRONMENT: 3}
    return sorted(names, key=lambda name: (ranks.get(PurePosixPath(name).name, 1), name))


def move_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files from a folder to another on the same disk, in this order. Folders that it empties are removed."""
    parents: set[Path] = set()
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
        parents |= {source / parent for parent in PurePosixPath(name).parents if str(parent) != "."}
    for folder in sorted(parents, reverse=True):  # the innermost first
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
