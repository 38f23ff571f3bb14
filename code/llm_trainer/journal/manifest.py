# SPDX-License-Identifier: Apache-2.0
"""The type of training_manifest.json, the record in the model folder of how a model was made."""

from pathlib import Path
from typing import Any, TypedDict, cast

from llm_trainer.common.files import read_json_object

MANIFEST = "training_manifest.json"


class Manifest(TypedDict, total=False):
    """A record of how a model was made.

    Fields that this type does not name stay in it. Manifests from before the first schema version lack some.
    """

    schema_version: int
    llm_trainer: str  # the version of this package
    training_job_name: str | None
    model: str
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
    versions: dict[str, str]
    export: dict[str, Any]  # checks of the result, and figures of the merge
    files: list[str]  # of the result, in the manifest's folder


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a model folder, empty where there is none. Raises UserError where it is not valid JSON."""
    return cast(Manifest, read_json_object(folder / MANIFEST))
