# SPDX-License-Identifier: Apache-2.0
"""The run of each tracker that a job writes to, kept beside its checkpoints, so that a resumed job continues it.

MLflow's is also left in the scratch folder, for the worker that registers the model.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

RUN_FILE = "mlflow-run"  # in the scratch folder
MODEL_PATH = "model"  # of the exported model in MLflow's run


@dataclass(frozen=True)
class RunIdentity:
    """What a tracker calls the run, and when the first job of it began, in seconds since the epoch."""

    run_id: str
    started: float


def recall_run(folder: Path | None, tracker: str) -> RunIdentity | None:
    """The run that the job before this one wrote to; None where there was none, or where that cannot be read."""
    if folder is None:
        return None
    try:
        return RunIdentity(**json.loads(identity_file(folder, tracker).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember_run(folder: Path | None, tracker: str, identity: RunIdentity) -> None:
    """Keep it, whole or not at all. Where that fails the run goes on: only a resumed job would begin another."""
    if folder is None:
        return
    file = identity_file(folder, tracker)
    unfinished = file.with_name(f".{file.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(identity)) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    except OSError as error:
        print(f"Warning: {file} cannot be written ({error}): a resumed job begins another run.", file=sys.stderr)


def identity_file(folder: Path, tracker: str) -> Path:
    return folder / f"tracked-run-{tracker}.json"


def leave_run(scratch_dir: Path, run_id: str) -> None:
    unfinished = scratch_dir / f".{RUN_FILE}"
    unfinished.write_text(run_id, encoding="utf-8")
    os.replace(unfinished, scratch_dir / RUN_FILE)


def find_left_run(scratch_dir: Path, patience: float) -> str | None:
    """The id of the job's run, as soon as there is one; None if there is none after so many seconds."""
    deadline = time.monotonic() + patience
    while not (scratch_dir / RUN_FILE).is_file():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return (scratch_dir / RUN_FILE).read_text(encoding="utf-8")
