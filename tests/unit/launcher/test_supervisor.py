# SPDX-License-Identifier: Apache-2.0
"""What the first host makes of a failure on several hosts. tests/integration/test_hosts.py has whole jobs."""

import subprocess
import time
from dataclasses import replace

import pytest

from llm_trainer.common.errors import Failure, Wait, report_failure
from llm_trainer.job.rank_traces import RankTraces
from llm_trainer.job.start_gate import StartGate
from llm_trainer.launcher import supervisor
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState
from llm_trainer.launcher.hosts.meeting import Quorum
from llm_trainer.launcher.supervisor import Attempts, AttemptSignals, HostWorkers, Supervisor

HOSTS = ("algo-1", "algo-2", "algo-3")
ECHO = Failure("Rank 0 lost the other ranks.", "peer", 1.0)


def wait_of(rank: int) -> Wait:
    return Wait(rank, [0, 1, 2], "all_reduce, collective 57 of its group", 57, 1800.0, True)


@pytest.fixture
def find_cause(tmp_path, monkeypatch):
    """Tells the cause that the first of three hosts finds when the others are so and its own rank waits, or runs."""

    def find(
        others: dict[str, HostState], own: list[Wait], command: tuple[str, ...] = ("sleep", "1000"), settle: float = 0.1
    ) -> Failure:
        monkeypatch.setattr(supervisor, "SETTLE_SECONDS", settle)
        link = ClusterLink(HOSTS, "algo-1", b"")
        for name, state in others.items():
            link.contacts[name].update(state)
        monkeypatch.setattr(RankTraces, "read_waits", lambda self, since: own)
        signals = AttemptSignals(tmp_path / "failures", tmp_path / "stop", StartGate(tmp_path))
        workers = HostWorkers(lambda attempts: child, list, str(tmp_path / "none-"), num_processes=1)
        attempts = Attempts(0, 1, HOSTS)
        with subprocess.Popen(command) as child:
            try:
                return Supervisor(link, Quorum(HOSTS, [3], 1), workers, signals, attempts).find_cause(child, attempt=1)
            finally:
                child.kill()

    return find


def test_the_rank_that_no_host_saw_waiting_is_named_with_its_host(find_cause):
    waiting = HostState("failed", 1, replace(ECHO, waits=(wait_of(1),)))
    cause = find_cause({"algo-2": waiting, "algo-3": HostState("running", 1)}, own=[wait_of(0)])
    assert cause.kind == "fault"
    assert cause.reason.startswith("Rank 2 on host algo-3 did not come to all_reduce, collective 57 of its group")


def test_the_first_hosts_own_rank_may_be_the_one(find_cause):
    states = {
        name: HostState("failed", 1, replace(ECHO, waits=(wait_of(rank),)))
        for rank, name in [(1, "algo-2"), (2, "algo-3")]
    }
    assert find_cause(states, own=[]).reason.startswith("Rank 0 on host algo-1 did not come to ")


def test_when_all_hosts_have_told_no_more_is_waited_for(find_cause, tmp_path):
    (tmp_path / "failures").mkdir()
    report_failure(tmp_path / "failures", "rank-0", ECHO)
    states = {name: HostState("failed", 1, replace(ECHO, time=2.0)) for name in HOSTS[1:]}
    assert find_cause(states, own=[], command=("false",), settle=float("inf")).reason.strip() == ECHO.reason


def test_a_fault_of_another_host_says_more_than_who_waited(find_cause):
    fault = Failure("Rank 2 on host algo-3 was killed by signal 9.", "fault", time.time())
    waiting = HostState("failed", 1, replace(ECHO, waits=(wait_of(1),)))
    assert find_cause({"algo-2": waiting, "algo-3": HostState("failed", 1, fault)}, own=[wait_of(0)]) == fault
