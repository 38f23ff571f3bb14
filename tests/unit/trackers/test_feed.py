# SPDX-License-Identifier: Apache-2.0
"""A tracker that fails now and then gets every record all the same, in order; and what the log says of it."""

import errno
import json
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.rest_utils import verify_rest_response
from requests import Response

from llm_trainer.journal.journal import Journal
from llm_trainer.trackers import feed
from llm_trainer.trackers.feed import Ending, Feed, TrackerUsageError, choose_advice
from support.waiting import GUARD_SECONDS


class FlakyTracker:
    """Takes what it is sent, but for the calls whose numbers are in `failing`, which raise after half of the work."""

    name = "Flaky"

    def __init__(self, failing=(), error=None):
        self.failing, self.error = failing, error or ConnectionError("https://me:secret@host is away")
        self.calls = 0
        self.records, self.uploaded, self.ended = [], [], None

    def call(self):
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise self.error

    def begin(self, job):
        self.call()
        return f"run of {job['name']}"

    def send(self, records):
        self.call()
        self.records += records

    def upload(self, files):
        self.call()
        self.uploaded = files

    def upload_model(self, folder):
        raise NotImplementedError

    def end(self, status, reason):
        self.call()
        self.ended = (status, reason)


@pytest.fixture
def journal(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(feed, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(feed, "LONGEST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(feed, "RECORDS_A_BATCH", 4)
    return Journal(tmp_path / "metrics.jsonl")


def feed_to_end(tracker, journal, ending=None, since=0.0):
    """Start the feed, write a job of ten records, end it, and wait for the feed."""
    ending = ending or Ending(status="done")
    thread = Feed(tracker, journal.file, since, ending)
    thread.start()
    journal.write("phase", name="check", seconds=1)
    journal.write("job", name="trial")
    for step in range(10):
        journal.write("metrics", step=step)
    ending.came.set()
    thread.join(GUARD_SECONDS)
    assert not thread.is_alive()
    return thread


def steps_of(tracker):
    return [record["step"] for record in tracker.records if record["kind"] == "metrics"]


def test_every_record_is_sent_once_and_in_order(journal, capsys):
    tracker = FlakyTracker()
    assert feed_to_end(tracker, journal).is_done
    assert steps_of(tracker) == list(range(10))
    assert tracker.records[0]["kind"] == "phase"  # from before the run
    assert tracker.ended == ("done", None)
    assert capsys.readouterr().out == "Flaky: run of trial\n"


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}, {2}, {4}, {5}])
def test_what_failed_is_sent_again_and_told_once(journal, capsys, failing):
    tracker = FlakyTracker(failing)
    assert feed_to_end(tracker, journal).is_done
    assert steps_of(tracker) == list(range(10))
    lines = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in lines if line.startswith("Warning")]
    assert warning == (
        f"Warning: Flaky does not take the metrics (https://***@host is away): they are kept in {journal.file} and "
        "sent when it does; check its address, and that the job's network leads there."
    )
    assert "Flaky is back, and has got what it missed." in lines


def test_a_tracker_that_stays_away_is_given_up_at_the_end(journal):
    tracker = FlakyTracker(range(10**6))
    assert not feed_to_end(tracker, journal).is_done
    assert tracker.ended is None


def test_a_tracker_that_is_used_wrongly_is_left_out_at_once(journal, capsys):
    tracker = FlakyTracker(range(10**6), TrackerUsageError("Invalid project name 'a/b'"))
    assert feed_to_end(tracker, journal).is_done
    assert tracker.calls == 1
    assert capsys.readouterr().out == (
        f"Warning: Flaky is left out: Invalid project name 'a/b'; all metrics are in {journal.file}.\n"
    )


def test_nothing_of_an_earlier_job_is_sent(journal):
    for _ in range(20):
        journal.write("metrics", step=-1)
    time.sleep(0.002)
    tracker = FlakyTracker()
    assert feed_to_end(tracker, journal, since=round(time.time(), 3)).is_done
    assert steps_of(tracker) == list(range(10))


INACTIVE = "The run 4031 must be in the 'active' state. Current state is deleted."


def refuse(status, body):
    """Return the error that MLflow's client raises for an answer of a server."""
    response = Response()
    response.status_code, response._content = status, body.encode()
    with pytest.raises(MlflowException) as raised:
        verify_rest_response(response, "/api/2.0/mlflow/runs/create")
    return raised.value


def refuse_as_json(**answer):
    return refuse(400, json.dumps(answer))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (ValueError("(sqlite3.OperationalError) database or disk is full"), "make room"),
        (ValueError("failed with error code 403 != 200"), "give credentials"),
        (ValueError("An error occurred (ExpiredTokenException): The security token has expired"), "give credentials"),
        (ValueError("Unable to locate credentials"), "give credentials"),
        (ConnectionError("Name or service not known"), "check its address, and that the job's network"),
        (ConnectionError("Max retries exceeded with url: /get?experiment_id=403 (port=401)"), "check its address, and"),
        (ConnectionError("Tunnel connection failed: 403 Forbidden"), "check its address, and that the job's network"),
        (refuse_as_json(error_code="PERMISSION_DENIED", message="Permission denied"), "give credentials"),
        (refuse_as_json(message="User: arn:aws:sts::1:role/r is not authorized to perform"), "give credentials"),
        (refuse(401, ""), "give credentials"),
        (refuse(403, "Forbidden"), "give credentials"),
        (refuse(404, "<html>Not here</html>"), "check that its address leads to the tracker itself"),
        (refuse(200, "<html>Sign in</html>"), "check that its address leads to the tracker itself"),
        (refuse_as_json(error_code="RESOURCE_DOES_NOT_EXIST", message="No run 'a'"), "check that its address leads to"),
        (refuse_as_json(error_code="INVALID_PARAMETER_VALUE", message=INACTIVE), "restore what was deleted there"),
        (refuse(404, "Tracking server could not be found"), "start that tracking server, or correct its ARN"),
        (refuse(400, "Tracking Server a is currently in status Stopped"), "start that tracking server"),
        (refuse(429, "slow down"), "it takes fewer requests"),
        (refuse(503, "upstream is gone"), "it answers and fails: look into its own log"),
        (refuse_as_json(error_code="INTERNAL_ERROR", message="database is locked"), "it answers and fails"),
        (ConnectionError("SSL: CERTIFICATE_VERIFY_FAILED self-signed certificate"), "give it a certificate"),
    ],
)
def test_the_advice_fits_the_error(error, advice):
    assert choose_advice(error).startswith(advice)
