# SPDX-License-Identifier: Apache-2.0
"""The folder of a model behind the place that a user names.

Users give the folder, one above it, a copy of a Hugging Face cache, or the model.tar.gz
that an earlier SageMaker job left. Whatever leaves no doubt is taken.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import ADAPTER_CONFIG
from llm_trainer.job.model_archive import find_archive, unpack_archive

CONFIG = "config.json"
MAX_DEPTH = 4  # of models--ORG--NAME/snapshots/REVISION below a cache's hub/
MAX_LISTED = 3
CACHE_FOLDERS = ("blobs", "refs", ".locks", ".no_exist")


def locate_model(place: str) -> str:
    """Return the model's folder at, below or inside of a place; the place itself where there is none to be found.

    An archive is unpacked. Raises UserError where several folders come into question, and for an archive that
    cannot be unpacked.
    """
    archive = find_archive(Path(place))
    if archive is None:
        return choose_folder(Path(place)) or place
    folder = unpack_archive(archive)
    return choose_folder(folder) or str(folder)


def choose_folder(folder: Path) -> str | None:
    """Return the only folder with a model at or below a folder; None where there is none. Raises UserError for more."""
    if not os.path.isdir(folder):  # unlike Path's, it takes a name that is too long for one that is not there
        return None
    if (folder / ADAPTER_CONFIG).is_file():
        return str(folder)  # the check of the model tells what to do with an adapter
    found = sorted(find_models(folder, MAX_DEPTH))
    if len(found) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in found[:MAX_LISTED])
        raise UserError(
            f"Model folder {folder} has no {CONFIG}, and {len(found)} folders below it have one ({listed}): name one "
            f"of them, model_id={str(found[0])!r}."
        )
    return str(found[0]) if found else None


def find_models(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders with a config.json at or below a folder. Of a Hub cache's snapshots, the one of `main`."""
    if (folder / CONFIG).is_file():
        yield folder
    elif depth > 0 and folder.is_dir():
        below = [entry for entry in folder.iterdir() if entry.name not in CACHE_FOLDERS and entry.is_dir()]
        main = folder.parent / "refs" / "main"
        if folder.name == "snapshots" and len(below) > 1 and main.is_file():
            below = [folder / main.read_text(encoding="utf-8", errors="replace").strip()]
        for entry in below:
            yield from find_models(entry, depth - 1)
