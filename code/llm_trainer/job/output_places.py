# SPDX-License-Identifier: Apache-2.0
"""The folders of a job's result and checkpoints: real ones, and on SageMaker such as outlive the container."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from llm_trainer.config.environment import Environment
from llm_trainer.config.sections import ADDRESS, OutputSettings, TrackingSettings
from llm_trainer.config.tracker_choice import SQLITE, choose_trackers, find_mlflow_uri
from llm_trainer.journal.manifest import ADAPTER, MANIFEST, list_whole_result
from llm_trainer.serving.lmi_files import ADAPTER_FILES, SERVING_FILES

# Names that every result of a kind has, or may have.
COMMON_NAMES = (
    *(MANIFEST, "README.md", *SERVING_FILES, "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)
WHOLE_NAMES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")


def find_place_problems(settings: OutputSettings, environment: Environment) -> Iterator[str]:
    """Yield a sentence for each folder of the settings that is none, or in which SageMaker would lose the result."""
    for name in ("output_dir", "checkpoint_dir"):
        path = settings.value(name)
        if path and ADDRESS.match(path):
            yield (
                f"{name}={path!r} is an address, and a job writes to a folder: leave it out; SageMaker copies the "
                "folder to S3."
            )
        elif path and not Path(path).is_absolute():
            yield f"{name}={path!r} is relative: give the whole path, such as {os.path.abspath(path)!r}."
        elif name == "output_dir" and path and not outlives_container(Path(path), environment):
            yield (
                f"output_dir={path!r} would be lost with the container: SageMaker uploads {environment.model_dir}; "
                "leave it out."
            )


def find_overlaps(model_dir: Path, read: Mapping[str, Path]) -> Iterator[str]:
    """Yield a sentence for each folder in `read`, by what it is, that the result's folder is, holds or lies in.

    A result replaces files by their names, and whoever reads such a folder would take the result's for its own.
    """
    own = model_dir.resolve()
    for what, folder in read.items():
        other = folder.resolve()
        if own == other:
            relation = "is"
        elif own.is_relative_to(other):
            relation = "lies in"
        elif other.is_relative_to(own):
            relation = "holds"
        else:
            continue
        yield f"output_dir={str(model_dir)!r} {relation} {what} ({folder}): give the result a folder of its own."


def find_taken_names(model_dir: Path, is_adapter: bool, merges: bool) -> Iterator[str]:
    """Yield a sentence where files that no job listed as its own have names of the result to come.

    `is_adapter` and `merges` tell whether the result is an adapter, and whether merged weights come beside it.
    """
    names = (*COMMON_NAMES, *(WHOLE_NAMES if merges or not is_adapter else ADAPTER_FILES))
    if merges:
        names += tuple(f"{ADAPTER}/{name}" for name in (*COMMON_NAMES, *ADAPTER_FILES))
    if taken := sorted(find_foreign_paths(model_dir, names)):
        yield (
            f"output_dir={str(model_dir)!r} holds {', '.join(taken)}, which the result would replace and no job's "
            f"{MANIFEST} lists as its own: move or remove it, or give another output_dir."
        )


def find_foreign_paths(model_dir: Path, names: Iterable[str]) -> set[str]:
    """Return what is in the way of files of these names, and is not listed by an earlier job."""
    own, foreign = set(list_whole_result(model_dir)), set()
    for name in names:
        parts = [model_dir / part for part in reversed(PurePosixPath(name).parents) if part.name]
        way = next((path for path in parts if path.is_symlink() or path.is_file()), model_dir / name)
        found = way.relative_to(model_dir).as_posix()
        # A manifest is an earlier job's even where it is broken, and so does not list itself.
        is_leftover = way.name == MANIFEST and way.is_file() and not way.is_symlink()
        if os.path.lexists(way) and found not in own and not is_leftover:
            foreign.add(found)
    return foreign


def find_place_warnings(
    output_settings: OutputSettings, tracking_settings: TrackingSettings, environment: Environment
) -> Iterator[str]:
    """Yield a sentence for each folder beside the result that SageMaker loses with the container."""
    folder = output_settings.checkpoint_dir
    if folder and not outlives_container(Path(folder), environment):
        yield (
            f"checkpoint_dir={folder!r} is not copied to S3: SageMaker copies {environment.checkpoint_dir}, and an "
            "interrupted job could not go on; leave it out."
        )
    uri = (find_mlflow_uri(tracking_settings) if "mlflow" in choose_trackers(tracking_settings) else None) or ""
    place = uri.removeprefix(SQLITE) if uri.startswith(SQLITE) else urlsplit(uri).path
    if uri.startswith((SQLITE, "file:", "/")) and not outlives_container(Path(place), environment):
        kept = environment.output_dir / "data"
        yield f"mlflow_uri={uri!r} is lost with the container: give a server, or a folder below {kept}."


def outlives_container(path: Path, environment: Environment) -> bool:
    """Tell whether the files of a folder stay when the job is over. Outside SageMaker that is the user's affair.

    SageMaker uploads the model, the output data and the checkpoints. A channel may be a mounted file system.
    """
    if not environment.runs_on_sagemaker:
        return True
    kept = [environment.model_dir, environment.output_dir / "data", environment.checkpoint_dir]
    kept += [folder for folder in environment.channels.values() if folder.is_mount()]
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in kept)
