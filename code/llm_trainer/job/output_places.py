# SPDX-License-Identifier: Apache-2.0
"""The folders of a job's result and checkpoints: real ones, and on SageMaker such as outlive the container."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from llm_trainer.config.environment import Environment
from llm_trainer.config.sections import ADDRESS, OutputSettings, TrackingSettings
from llm_trainer.config.tracker_choice import SQLITE, choose_trackers, find_mlflow_uri


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
