# SPDX-License-Identifier: Apache-2.0
"""Jobs that have to do the same: one that was stopped and one that was not, or two with the same metrics."""

import signal

import pytest

from support.sagemaker_tree import finish, metrics_of, read_weights


def check_stop_changes_nothing(whole, stopped, start, step=4):
    """Run a job as a whole, and its twin with a stop after some steps. Both have the same weights in the end."""
    finish(whole)
    job = start(stopped)
    job.wait_for(f"step={step}")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    assert step <= stopped.manifest["num_steps"] < whole.manifest["num_steps"]
    assert "Resuming from" in finish(stopped)
    assert stopped.manifest["num_steps"] == whole.manifest["num_steps"]
    assert read_weights(stopped) == read_weights(whole)


def check_metrics_are_alike(found, expected, keys, **tolerance):
    """Compare the metrics of two logs, line by line. `tolerance` goes to pytest.approx."""
    for key in keys:
        assert metrics_of(found, key) == pytest.approx(metrics_of(expected, key), **tolerance), key
