# SPDX-License-Identifier: Apache-2.0
"""training_manifest.json, the record in the model folder of how a model was made, and the files that it lists."""

import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, cast

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import is_inner_path, read_json_object

MANIFEST = "training_manifest.json"
ADAPTER = "adapter"  # the folder beside merged weights
# The folders that hold files of a result: the model folder itself, the one in which LMI looks for adapters, and the one
# in which Transformers keeps a tokenizer's further chat templates.
RESULT_FOLDERS = (".", "adapters/trained", "additional_chat_templates")
# Version 0.1.0 listed folders. A listed folder stands for the files that such a job wrote in it, by their patterns.
LISTED_FOLDERS = {
    "adapters": ("adapters/trained/adapter_config.json", "adapters/trained/adapter_model.safetensors"),
    "additional_chat_templates": ("additional_chat_templates/*.jinja",),
}


class Manifest(TypedDict, total=False):
    """A record of how a model was made.

    Fields that this type does not name stay in it. Manifests from before the first schema version lack some.
    """

    schema_version: int
    llm_trainer: str  # the version of this package
    training_job_name: str | None
    model: str
    base_digest: str | None  # of some bytes of the base's weights
    lineage: list[dict[str, Any]]  # the adapters that the training went on from, the newest first
    teacher_digest: str  # of some bytes of the teacher's weights, and how they were rounded
    settings: dict[str, Any]  # without secrets
    training_arguments: dict[str, Any]  # those that decide the result, and are left to a default
    trainable_parameters: int
    parameters: int
    adapter: dict[str, Any]
    audited_rows_of_each_train_source: int | str
    data: dict[str, dict[str, Any]]  # by split, as DataReport.summary() gives it
    packing: dict[str, Any]
    memory: dict[str, Any]
    metrics: dict[str, Any]
    num_steps: int
    total_steps: int
    stopped: bool
    world_size: int
    phase_seconds: dict[str, float]
    planned_and_actual: dict[str, Any]  # memory, time and cost of the job, as planned and as they were
    versions: dict[str, str]
    export: dict[str, Any]  # whether the result is proven, the checks, and figures of the merge
    files: list[str]  # of the result, by their paths in the manifest's folder


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a model folder, empty where there is none. Raises UserError where it is not valid JSON."""
    return cast(Manifest, read_json_object(folder / MANIFEST))


def read_leftover_manifest(folder: Path) -> tuple[Manifest, str | None]:
    """Return the manifest that an earlier job left in a folder, and why it cannot be read where that is so.

    The reason is a sentence without its end. The manifest is empty then, and where there is none.
    """
    file = folder / MANIFEST
    try:
        if file.is_file() and not file.is_symlink():
            return read_manifest(folder), None
        return Manifest(), f"{file} is no file" if file.is_symlink() or file.exists() else None
    except (UserError, OSError, ValueError, RecursionError) as error:
        return Manifest(), f"{file} cannot be read ({quote_error(error)})"


def list_result_files(folder: Path) -> list[str]:
    """List the files and links in a model folder that its manifest says a job wrote there, by their paths in it.

    Whoever wrote the manifest may have been no job. A name is left out where it leaves the folder, leads through a
    link, or belongs to a folder.
    """
    files = read_leftover_manifest(folder)[0].get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    patterns = [pattern for name in names for pattern in LISTED_FOLDERS.get(name, ())]
    names += [path.relative_to(folder).as_posix() for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [name for name in dict.fromkeys(names) if is_result_file(folder, name)]


def list_whole_result(model_dir: Path) -> list[str]:
    """List the files of a result, and of an adapter beside it, by their manifests and their paths in the model folder.

    All else in that folder is nobody's result, and neither replaced nor sent anywhere.
    """
    own = [] if (model_dir / ADAPTER).is_symlink() else list_result_files(model_dir / ADAPTER)
    return [*(f"{ADAPTER}/{name}" for name in own), *list_result_files(model_dir)]


def is_result_file(folder: Path, name: Any) -> bool:
    """Tell whether a name of a manifest belongs to a file or link which a job may have written in the folder."""
    if not is_inner_path(name) or str(parent := PurePosixPath(name).parent) not in RESULT_FOLDERS:
        return False
    try:
        behind_link = any((folder / part).is_symlink() for part in (parent, *parent.parents) if str(part) != ".")
        kind = (folder / name).lstat().st_mode
    except (OSError, ValueError):  # not there, or no name that a file system takes
        return False
    return not behind_link and (stat.S_ISREG(kind) or stat.S_ISLNK(kind))


def find_unreadable_manifests(model_dir: Path) -> Iterator[str]:
    """Yield a sentence for each manifest of an earlier job that does not tell which files the new result replaces."""
    for folder in (model_dir, model_dir / ADAPTER):
        reason = read_leftover_manifest(folder)[1]
        if reason is not None:
            yield f"{reason}: what an earlier job left in {folder} stays beside the new result; remove it."
