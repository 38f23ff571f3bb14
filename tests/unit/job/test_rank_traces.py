# SPDX-License-Identifier: Apache-2.0
"""The rank that did not come is named by the traces of those that waited: real ones of gloo, made-up ones of NCCL."""

import json
import multiprocessing
import os
import pickle
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from llm_trainer.common.errors import Failure, Wait, parse_failure
from llm_trainer.job import rank_traces
from llm_trainer.job.rank_traces import (
    RankTraces,
    build_trace_variables,
    describe_meeting,
    find_missing_ranks,
    find_trace_prefix,
    write_trace,
)
from support.waiting import GUARD_SECONDS

PEER = Failure("Rank 0 was killed by SIGABRT.", "peer", 1.0)
LIMIT_SECONDS = 1800


def make_entry(number: int, state: str = "scheduled", age: float = LIMIT_SECONDS + 1, **changes: object) -> dict:
    """An entry of the flight recorder, of a collective that is so many seconds old."""
    entry = {
        "process_group": ("0", "default_pg"),
        "collective_seq_id": number,
        "profiling_name": "nccl:all_reduce",
        "time_created_ns": int((time.time() - age) * 1e9),
        "timeout_ms": LIMIT_SECONDS * 1000,
        "state": state,
        "is_p2p": False,
    }
    return {**entry, **changes}


@pytest.fixture
def traces(tmp_path) -> RankTraces:
    """The traces of four ranks on two hosts."""
    return RankTraces(str(tmp_path / "collectives-rank-"), ("algo-1", "algo-2"), 4)


@pytest.fixture
def write_pickle(tmp_path):
    """Writes the trace of a rank as NCCL's watchdog does."""

    def write(rank: int, *entries: dict, ranks: str = "[0, 1, 2, 3]") -> None:
        config = {"0": {"name": "0", "desc": "default_pg", "ranks": ranks}}
        trace = {"version": "2.10", "pg_config": config, "pg_status": {}, "entries": list(entries)}
        (tmp_path / f"collectives-rank-{rank}").write_bytes(pickle.dumps(trace, protocol=2))

    return write


def test_the_rank_that_has_nothing_to_wait_for_did_not_come(traces, write_pickle):
    for rank in (0, 1, 3):
        write_pickle(rank, make_entry(56, "completed"), make_entry(57), make_entry(58))
    write_pickle(2, make_entry(56, "completed"))
    failure = traces.blame_missing_ranks(PEER, traces.read_waits(since=0))
    assert failure.kind == "fault"
    assert failure.reason.startswith(
        "Rank 2 on host algo-2 did not come to all_reduce, collective 57 of its group, for which rank 0 waited longer "
        "than ddp_timeout (now 1800 s): the log holds what it said last; if it is only slow, raise ddp_timeout."
    )
    assert len(failure.reason) < 500


def test_a_rank_without_a_trace_did_not_come_either(traces, write_pickle):
    for rank in (0, 3):
        write_pickle(rank, make_entry(57))
    assert "Rank 1 on host algo-1, 2 on host algo-2 did not come" in (
        traces.blame_missing_ranks(PEER, traces.read_waits(since=0)).reason
    )


def test_where_all_ranks_wait_none_is_named(traces, write_pickle):
    for rank in range(4):
        write_pickle(rank, make_entry(57))
    assert traces.blame_missing_ranks(PEER, traces.read_waits(since=0)) is PEER


def test_a_wait_that_was_broken_off_before_its_time_names_nobody(traces, write_pickle):
    write_pickle(0, make_entry(57, age=3))
    assert traces.blame_missing_ranks(PEER, traces.read_waits(since=0)) is PEER


def test_a_cause_that_says_more_stays(traces, write_pickle):
    write_pickle(0, make_entry(57))
    cause = Failure("Rank 1 ran out of memory.", "mistake", 1.0)
    assert traces.blame_missing_ranks(cause, traces.read_waits(since=0)) is cause


def test_traces_of_an_earlier_attempt_are_not_read(traces, write_pickle):
    write_pickle(0, make_entry(57))
    assert traces.read_waits(since=time.time() + 60) == []


def test_a_rank_that_waits_in_another_group_is_not_missing():
    waits = [Wait(0, [0, 1], "all_reduce", 7, 1.0, True), Wait(1, [1, 2], "all_gather", 3, 1.0, True)]
    assert find_missing_ranks(waits) == (waits[1], [2])


def test_ranks_that_never_came_to_the_first_meeting_are_named(traces):
    waits = [describe_meeting(rank, 4, LIMIT_SECONDS) for rank in (0, 2)]
    failure = traces.blame_missing_ranks(PEER, waits)
    assert failure.kind == "fault"
    assert failure.reason == (
        "Rank 1 on host algo-1, 3 on host algo-2 did not come to the meeting of all ranks at the start, for which rank "
        "0 waited longer than ddp_timeout (now 1800 s): the log holds what it said last; if it is only slow, raise "
        "ddp_timeout."
    )


def test_a_folder_for_traces_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "data").touch()
    RankTraces(str(tmp_path / "data/collectives-rank-"), ("algo-1",), 2).make_folder()
    assert "a hang will leave no trace" in capsys.readouterr().out


def test_what_waited_goes_to_the_other_hosts_as_json(traces, write_pickle):
    write_pickle(0, make_entry(57))
    (wait,) = traces.read_waits(since=0)
    told = json.loads(json.dumps({"reason": "a", "kind": "peer", "time": 1.0, "waits": [wait.__dict__]}))
    assert parse_failure(told).waits == (wait,)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE_DIR"],)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02", b"no pickle", b"\x80\x02}q.", pickle.dumps([1]), pickle.dumps({"entries": [{"is_p2p": 0}]})],
)
def test_a_file_that_is_no_trace_is_passed_over(traces, tmp_path, content):
    (tmp_path / "collectives-rank-0").write_bytes(content)
    (tmp_path / "collectives-rank-1.json").write_bytes(content)
    assert traces.read_waits(since=0) == []


def test_nothing_of_a_hostile_trace_is_run(traces, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE_DIR", str(tmp_path / "made"))
    (tmp_path / "collectives-rank-0").write_bytes(pickle.dumps({"entries": [Hostile()]}))
    assert traces.read_waits(since=0) == []
    assert not (tmp_path / "made").exists()


def test_a_huge_file_is_not_read_whole(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_traces, "MAX_TRACE_BYTES", 100)
    (tmp_path / "collectives-rank-0").write_bytes(pickle.dumps({"entries": ["a" * 1000]}))
    assert traces.read_waits(since=0) == []


def test_a_users_own_place_for_traces_is_kept(tmp_path):
    ours = build_trace_variables(tmp_path, {})
    assert ours == {
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/data/collectives-rank-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        assert build_trace_variables(tmp_path, {name: "/mine"}) == {}
        assert find_trace_prefix({name: "/mine"}) == "/mine"
    assert RankTraces(find_trace_prefix({}), ("algo-1",), 2).read_waits(since=0) == []


def wait_in_vain(rank: int, prefix: str) -> None:
    """Take part in two sums, of which rank 1 leaves out the second. Rank 0 leaves its trace in both forms."""
    distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=1))
    distributed.all_reduce(torch.ones(1))
    if rank == 1:
        time.sleep(GUARD_SECONDS)
    try:
        distributed.all_reduce(torch.ones(1))
    except RuntimeError:
        from torch._C._distributed_c10d import _dump_fr_trace, _dump_fr_trace_json

        write_trace(prefix, 0, _dump_fr_trace_json(includeCollectives=True, onlyActive=False))
        Path(f"{prefix}0").write_bytes(_dump_fr_trace(True, True, False))
    os._exit(0)


def test_the_traces_of_this_torch_are_read_in_both_forms(tmp_path, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    traces = RankTraces(str(tmp_path / "collectives-rank-"), ("algo-1",), 2)
    context = multiprocessing.get_context("fork")  # a fresh process would import torch for seconds
    ranks = [context.Process(target=wait_in_vain, args=(rank, traces.prefix)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(GUARD_SECONDS)
    ranks[1].kill()
    ranks[1].join()
    waits = traces.read_waits(since=0)
    assert waits == [Wait(0, [0, 1], "all_reduce, collective 2 of its group", 2, 1.0, True)] * 2
    assert traces.blame_missing_ranks(PEER, waits).reason.startswith(
        "Rank 1 did not come to all_reduce, collective 2 of"
    )
