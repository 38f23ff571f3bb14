# SPDX-License-Identifier: Apache-2.0
"""The reporter's options and patience; tests/integration/test_tracking.py runs the process."""

import io
import sys
from pathlib import Path

import pytest

from llm_trainer.journal.journal import Journal
from llm_trainer.trackers import reporter
from llm_trainer.trackers.feed import Ending


def test_the_options_are_those_of_the_launcher():
    options = reporter.parse_arguments(["metrics.jsonl", "--trackers=mlflow,wandb", "--model-dir=model"])
    assert (options.journal, options.trackers) == (Path("metrics.jsonl").absolute(), ["mlflow", "wandb"])
    assert (options.checkpoint_dir, options.model_dir, options.track_model) == (None, Path("model").absolute(), False)


def test_a_tracker_that_cannot_be_loaded_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(reporter, "build_tracker", lambda name, options: 1 / 0 if name == "wandb" else name)
    options = reporter.parse_arguments(["metrics.jsonl", "--trackers=wandb,mlflow", "--model-dir=model"])
    assert reporter.build_trackers(options) == ["mlflow"]
    assert capsys.readouterr().out.startswith("Warning: wandb cannot be loaded (division by zero)")


def test_a_stop_leaves_little_time_and_a_large_model_gets_more(tmp_path):
    stop_file = tmp_path / "stop"
    assert reporter.find_patience(stop_file, None) == reporter.FINISH_SECONDS
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(bytes(40_000))
    patience = reporter.find_patience(stop_file, tmp_path / "model")
    assert patience == pytest.approx(reporter.FINISH_SECONDS + 40_000 / reporter.UPLOAD_BYTES_A_SECOND)
    stop_file.touch()
    assert reporter.find_patience(stop_file, tmp_path / "model") == reporter.FINISH_SECONDS_OF_STOP


def test_the_end_is_this_jobs_own(tmp_path, monkeypatch):
    with (tmp_path / "input").open("w+") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(reporter.select, "select", lambda *arguments: ([], [], []))
        journal = Journal(tmp_path / "metrics.jsonl")
        journal.write("end", status="failed", reason="broke")
        ending = Ending()
        reporter.wait_for_end(journal.file, 0.0, ending)
    assert (ending.status, ending.reason) == ("failed", "broke")


def test_a_launcher_that_is_gone_is_the_end_of_a_job_that_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(reporter.select, "select", lambda *arguments: ([sys.stdin], [], []))
    ending = Ending()
    reporter.wait_for_end(tmp_path / "metrics.jsonl", 0.0, ending)
    assert (ending.status, ending.reason) == ("stopped", None)
