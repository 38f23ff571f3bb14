# SPDX-License-Identifier: Apache-2.0
"""A stop is asked for by a signal's file, or by the clock early enough for the last checkpoint and the export."""

from datetime import timedelta

import pytest
import torch
from torch import distributed

from llm_trainer.job.rank_traces import STOP_GROUP
from llm_trainer.training import stopping
from llm_trainer.training.stopping import StopConsensus, StopRequest

STARTED = 1_000_000.0


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in seconds after the job's start."""
    return lambda seconds: monkeypatch.setattr(stopping.time, "time", lambda: STARTED + seconds)


def test_a_file_asks_for_a_stop(tmp_path, clock):
    clock(10**6)
    request = StopRequest(tmp_path / "stop", STARTED, max_run_seconds=None)
    assert not request.is_made(checkpoint_seconds=10**9)
    assert request.age_seconds() == 0.0
    (tmp_path / "stop").touch()
    assert request.is_made()


@pytest.mark.parametrize(
    ("max_run_seconds", "checkpoint_seconds", "last_second"),
    [(100, 0.0, 90), (100, 5.0, 75), (86_400, 0.0, 86_340), (86_400, 100.0, 86_040)],
)
def test_the_clock_leaves_time_for_the_end(tmp_path, clock, max_run_seconds, checkpoint_seconds, last_second):
    request = StopRequest(tmp_path / "stop", STARTED, max_run_seconds)
    clock(last_second)
    assert not request.is_made(checkpoint_seconds)
    clock(last_second + 1)
    assert request.is_made(checkpoint_seconds)
    assert request.age_seconds() == 0.0


def test_ranks_ask_each_other_about_once_a_second_within_a_step():
    consensus = StopConsensus(1800)
    assert consensus.count_batches_between_polls(8) == 1  # the first step: nobody knows how long it takes
    for step_seconds, batches in ((64.0, 1), (4.0, 2), (2.0, 4), (0.5, 16), (0.0, 8000)):
        assert consensus.poll(stop=False, save=True, step_seconds=step_seconds) == (False, True)
        assert consensus.count_batches_between_polls(8) == batches


def test_ranks_wait_for_each_others_wishes_as_long_as_ddp_timeout_says():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group = StopConsensus(7200).group
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7200)
        assert group.group_desc == STOP_GROUP
    finally:
        distributed.destroy_process_group()
