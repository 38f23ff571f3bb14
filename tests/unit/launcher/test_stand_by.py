# SPDX-License-Identifier: Apache-2.0
"""The processes of a node end with the first of them, by its exit code, and none waits for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.placement import Placement
from llm_trainer.launcher import stand_by as module
from llm_trainer.launcher.stand_by import Leader, stand_by
from support.waiting import GUARD_SECONDS, wait_until


@pytest.fixture
def first(request):
    """The first of three processes on a node, in a job that no other test has."""
    return Placement("torchrun", num_local=3, first_address="127.0.0.1", job=(request.node.name,))


def others(first):
    return [replace(first, local_rank=number) for number in (1, 2)]


@pytest.mark.parametrize("exit_code", [0, 1])
def test_all_end_with_the_first_ones_exit_code(first, exit_code):
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(stand_by, other, GUARD_SECONDS) for other in others(first)]  # they may be earlier
        with Leader(first) as leader:
            leader.end(exit_code)
        assert [end.result(GUARD_SECONDS) for end in waiting] == [exit_code, exit_code]


def test_a_crash_of_the_first_one_is_an_exit_code_too(first):
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(stand_by, other, GUARD_SECONDS) for other in others(first)]
        with pytest.raises(MemoryError), Leader(first):
            raise MemoryError
        assert [end.result(GUARD_SECONDS) for end in waiting] == [1, 1]


def test_a_first_process_that_is_killed_is_told(first):
    with ThreadPoolExecutor() as pool:
        leader = Leader(first)
        leader.__enter__()
        waiting = [pool.submit(stand_by, other, GUARD_SECONDS) for other in others(first)]
        wait_until(lambda: len(leader.siblings) == 2)
        for line in leader.siblings.values():
            line.close()  # as the kernel does
        leader.server.close()
        for end in waiting:
            with pytest.raises(UserError, match="local rank 0 on this node was killed"):
                end.result(GUARD_SECONDS)


def test_a_first_process_that_never_comes_is_told(first):
    with pytest.raises(UserError, match="No process with local rank 0 came within 0 s on this node, where one has"):
        stand_by(others(first)[0], 0.2)


def test_a_local_rank_given_twice_is_told(first, monkeypatch):
    monkeypatch.setattr(module, "LATE_SECONDS", 0.1)
    with Leader(first) as leader:
        with pytest.raises(UserError, match="Two processes of this node were started with local rank 0"):
            Leader(first).__enter__()
        threading.Thread(target=stand_by, args=[others(first)[0], GUARD_SECONDS]).start()
        wait_until(lambda: 1 in leader.siblings)
        with pytest.raises(UserError, match="Two processes of this node were started with local rank 1"):
            stand_by(others(first)[0], GUARD_SECONDS)


def test_a_process_that_never_came_is_told_at_the_end(first, monkeypatch, capfd):
    """Its launcher has set what tells of it: the first one has started a worker for its device."""
    monkeypatch.setattr(module, "LATE_SECONDS", 0.1)
    with Leader(first) as leader:
        leader.end(0)
    text = "no process with local rank 1, 2 came: this one has started the workers of all devices.\n"
    assert capfd.readouterr().out == f"Warning: {text}"


def test_a_process_alone_waits_for_nobody():
    with Leader(Placement()) as leader:
        assert leader.server is None
