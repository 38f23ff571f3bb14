# SPDX-License-Identifier: Apache-2.0
import threading

import pytest

from llm_trainer.trackers.run_identity import (
    RUN_FILE,
    RunIdentity,
    find_left_run,
    leave_run,
    recall_run,
    remember_run,
)
from support.hostile_files import HOSTILE


def test_a_resumed_job_recalls_each_trackers_run(tmp_path):
    folder = tmp_path / "checkpoints"
    assert recall_run(folder, "mlflow") is None
    for tracker in ("mlflow", "wandb"):
        remember_run(folder, tracker, RunIdentity(f"of {tracker}", 12.5))
    assert recall_run(folder, "mlflow") == RunIdentity("of mlflow", 12.5)
    assert sorted(file.name for file in folder.iterdir()) == ["tracked-run-mlflow.json", "tracked-run-wandb.json"]


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"run_id": "a", "started": 1, "newer": 2}', '{"run_id": 1, "started": "x"}']
)
def test_an_identity_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "tracked-run-mlflow.json").write_text(content)
    assert recall_run(tmp_path, "mlflow") is None


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_identity_is_none(tmp_path, content):
    (tmp_path / "tracked-run-mlflow.json").write_bytes(content)
    assert recall_run(tmp_path, "mlflow") is None


def test_without_a_folder_nothing_is_kept():
    remember_run(None, "mlflow", RunIdentity("a", 1.0))
    assert recall_run(None, "mlflow") is None


def test_an_identity_that_cannot_be_kept_is_told_of(tmp_path, capsys):
    (tmp_path / "file").touch()
    remember_run(tmp_path / "file", "mlflow", RunIdentity("a", 1.0))
    assert "a resumed job begins another run." in capsys.readouterr().err


def test_a_worker_finds_the_run_that_was_left_for_it(tmp_path):
    assert find_left_run(tmp_path, patience=0) is None
    threading.Timer(0.2, leave_run, [tmp_path, "12ab"]).start()
    assert find_left_run(tmp_path, patience=60) == "12ab"
    assert [file.name for file in tmp_path.iterdir()] == [RUN_FILE]
