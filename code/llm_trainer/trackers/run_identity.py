# SPDX-License-Identifier: Apache-2.0
"""The run of each tracker that a job writes to, kept beside its checkpoints, so that a resumed job continues it.

The scratch folder holds MLflow's run, too, for the worker that registers the model. Reporter and worker log its files.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from llm_trainer.common import log
from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.files import write_verbatim

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_FILE = "mlflow-run"  # in the scratch folder
MODEL_PATH = "model"  # of the exported model in MLflow's run


@dataclass(frozen=True)
class RunIdentity:
    """A tracker's name for the run, and when its first job began, in seconds since the epoch."""

    run_id: str
    started: float


def recall_run(folder: Path | None, tracker: str) -> RunIdentity | None:
    """Return the run that the job before this one wrote to, or None where none can be read."""
    if folder is None:
        return None
    try:
        identity = RunIdentity(**read_json(name_identity_file(folder, tracker)))
    except (UnreadableTextError, TypeError):
        return None
    is_sound = isinstance(identity.run_id, str) and isinstance(identity.started, int | float)
    return identity if is_sound else None


def remember_run(folder: Path | None, tracker: str, identity: RunIdentity) -> None:
    """Keep a run for a resumed job. Where that fails the run goes on, and a resumed job would begin another."""
    if folder is None:
        return
    file = name_identity_file(folder, tracker)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_verbatim(file, json.dumps(asdict(identity)) + "\n")
    except OSError as error:
        log.error(f"Warning: {file} cannot be written ({error}): a resumed job begins another run.")


def name_identity_file(folder: Path, tracker: str) -> Path:
    """Return the path of a tracker's file beside the checkpoints."""
    return folder / f"tracked-run-{tracker}.json"


def leave_run(scratch_dir: Path, run_id: str) -> None:
    """Leave the id of MLflow's run for the worker that registers the model."""
    write_verbatim(scratch_dir / RUN_FILE, run_id)


def find_left_run(scratch_dir: Path, patience: float) -> str | None:
    """Return the id of the job's run as soon as there is one, or None if there is none after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (scratch_dir / RUN_FILE).is_file():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return (scratch_dir / RUN_FILE).read_text(encoding="utf-8")


def log_files(client: "MlflowClient", run_id: str, folder: Path, names: Iterable[str], place: str) -> None:
    """Log files of a folder to a place in MLflow's run. `names` are their paths in the folder, which they keep."""
    for name in names:
        client.log_artifact(run_id, str(folder / name), str(PurePosixPath(place, name).parent))
