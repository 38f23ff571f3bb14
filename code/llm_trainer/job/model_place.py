# SPDX-License-Identifier: Apache-2.0
"""The folder of a model, or of an adapter, behind the place that a user names.

Users give the folder, one above it, a copy of a Hugging Face cache, or the model.tar.gz
that an earlier SageMaker job left. Whatever leaves no doubt is taken.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import ADAPTER_CONFIG
from llm_trainer.job.model_archive import find_archive, unpack_archive

CONFIG = "config.json"
MAX_DEPTH = 4  # of models--ORG--NAME/snapshots/REVISION below a cache's hub/
MAX_LISTED = 3
CACHE_FOLDERS = ("blobs", "refs", ".locks", ".no_exist")


@dataclass(frozen=True)
class Kind:
    """A kind of folder: its name in messages, the file that tells it, and the setting that names it."""

    title: str
    config: str
    setting: str


MODEL = Kind("Model", CONFIG, "model_id")
ADAPTER = Kind("Adapter", ADAPTER_CONFIG, "adapter_path")


def locate_model(place: str) -> str:
    """Return the model's folder at, below or inside of a place; the place itself where there is none to be found.

    An archive is unpacked. Raises UserError where several folders come into question, and for an archive that
    cannot be unpacked.
    """
    return locate(Path(place), MODEL) or place


def locate_adapter(place: str) -> str:
    """Return the adapter's folder at, below or inside of a place; the place itself where there is none to be found.

    An archive is unpacked, and refused, as by `locate_model`. Beside a merged model it is the adapter that was merged.
    """
    return locate(Path(place), ADAPTER) or place


def locate(place: Path, kind: Kind) -> str | None:
    """Return the folder of this kind at, below or inside of a place, None where there is none."""
    archive = find_archive(place)
    if archive is None:
        return choose_folder(place, kind)
    folder = unpack_archive(archive)
    return choose_folder(folder, kind) or str(folder)


def choose_folder(folder: Path, kind: Kind) -> str | None:
    """Return the only folder of a kind at or below a folder; None where there is none. Raises UserError for more."""
    if not os.path.isdir(folder):  # unlike Path's, it takes a name that is too long for one that is not there
        return None
    if (folder / ADAPTER_CONFIG).is_file():
        return str(folder)  # the check of the model tells what to do with an adapter
    found = sorted(find_folders(folder, kind.config, MAX_DEPTH))
    if len(found) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in found[:MAX_LISTED])
        raise UserError(
            f"{kind.title} folder {folder} has no {kind.config}, and {len(found)} folders below it have one "
            f"({listed}): name one of them, {kind.setting}={str(found[0])!r}."
        )
    return str(found[0]) if found else None


def find_folders(folder: Path, config: str, depth: int) -> Iterator[Path]:
    """Yield the folders with this config at or below a folder. Of a Hub cache's snapshots, the one of `main`."""
    if (folder / config).is_file():
        yield folder
    elif depth > 0 and folder.is_dir():
        below = [entry for entry in folder.iterdir() if entry.name not in CACHE_FOLDERS and entry.is_dir()]
        main = folder.parent / "refs" / "main"
        if folder.name == "snapshots" and len(below) > 1 and main.is_file():
            below = [folder / main.read_text(encoding="utf-8", errors="replace").strip()]
        for entry in below:
            yield from find_folders(entry, config, depth - 1)
