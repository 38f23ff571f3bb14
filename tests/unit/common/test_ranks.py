# SPDX-License-Identifier: Apache-2.0
import threading

import pytest

from llm_trainer.common import ranks
from support.waiting import GUARD_SECONDS


def test_without_torchrun_a_process_is_the_only_worker(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.local_rank(), ranks.world_size(), ranks.local_world_size()) == (0, 0, 1, 1)


def test_the_place_among_the_workers_is_torchruns(monkeypatch):
    for number, name in enumerate(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), 5):
        monkeypatch.setenv(name, str(number))
    assert (ranks.rank(), ranks.local_rank(), ranks.world_size(), ranks.local_world_size()) == (5, 6, 7, 8)


@pytest.mark.parametrize(("host", "text"), [(None, "Rank 3"), ("algo-2", "Rank 3 on host algo-2")])
def test_a_rank_is_named_with_its_host(monkeypatch, host, text):
    monkeypatch.delenv("LLM_TRAINER_HOST", raising=False)
    if host:
        monkeypatch.setenv("LLM_TRAINER_HOST", host)
    assert ranks.describe_rank(3) == text


def test_the_first_worker_of_a_host_works_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    done, calls = tmp_path / "done", []
    for _ in range(2):
        ranks.run_on_local_rank_zero(done, lambda: calls.append(done.exists()))
    assert calls == [False]


def test_the_others_wait_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(ranks, "POLL_SECONDS", 0.01)
    waiting = threading.Thread(target=ranks.run_on_local_rank_zero, args=[tmp_path / "done", pytest.fail])
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    (tmp_path / "done").touch()
    waiting.join(GUARD_SECONDS)
    assert not waiting.is_alive()
