# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder has one job at a time. The other jobs here are real processes."""

import errno
import fcntl
import os
import re
import subprocess
import sys

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.job.checkpoint_lock import LOCK, find_other_job, lock_checkpoints

HOLDER = """
import pathlib, sys
from llm_trainer.job.checkpoint_lock import lock_checkpoints
lock_checkpoints(pathlib.Path(sys.argv[1]), "algo-1")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a job that holds the folder."""
    jobs = []

    def start():
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(tmp_path)],
                env={**os.environ, "TRAINING_JOB_NAME": "first-job"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert jobs[-1].stdout.readline() == "locked\n"
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.communicate()


def test_a_second_job_is_refused_in_one_sentence_that_names_the_first(hold, tmp_path):
    job = hold()
    with pytest.raises(UserError) as refusal:
        lock_checkpoints(tmp_path, "algo-1")
    assert re.fullmatch(
        rf"checkpoint_dir='{tmp_path}' is in use by job 'first-job' \(host algo-1, process {job.pid}\) since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, and two jobs would delete each other's checkpoints: "
        r"wait for its end, or give this job a checkpoint_dir of its own\.",
        str(refusal.value),
    )
    assert find_other_job(tmp_path) == str(refusal.value)


def test_a_job_that_was_killed_locks_nothing_and_its_file_neither(hold, tmp_path):
    job = hold()
    job.kill()
    job.wait()
    assert (tmp_path / LOCK).exists()  # as S3 sends it back
    assert find_other_job(tmp_path) is None
    hold()
    assert find_other_job(tmp_path) is not None


def test_a_job_that_ends_leaves_no_file(hold, tmp_path):
    hold().communicate("")
    assert not (tmp_path / LOCK).exists()
    assert find_other_job(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff{", b"[" * 5000, b'{"since": "now"}', b'{"since": 1e300}', b'{"since": NaN}']
)
def test_a_file_that_tells_nothing_is_no_crash(hold, tmp_path, content):
    hold()
    (tmp_path / LOCK).write_bytes(content)
    assert "is in use by another job (host unknown, process unknown), and" in find_other_job(tmp_path)


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch, capfd):
    def refuse(stream, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_checkpoints(tmp_path / "checkpoints", "algo-1")
    assert "is on a file system without locks" in capfd.readouterr().out
    assert find_other_job(tmp_path / "checkpoints") is None
