# SPDX-License-Identifier: Apache-2.0
"""Who may train, by what the first host has heard. tests/integration/test_lost_hosts.py has whole jobs."""

import time

import pytest

from llm_trainer.common.errors import Failure
from llm_trainer.launcher.hosts.agreement import digest_facts
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState
from llm_trainer.launcher.hosts.meeting import Quorum, compare_facts, judge_absence

HOSTS = ("algo-1", "algo-2", "algo-3", "algo-4")


@pytest.fixture
def link():
    return ClusterLink(HOSTS, "algo-1", b"")


def elastic(*counts):
    return Quorum(HOSTS, counts, timeout=5.0, goes_on_without=True)


@pytest.mark.parametrize(("there", "chosen"), [(4, 4), (3, 2), (2, 2), (1, 0)])
def test_as_many_hosts_train_as_the_batch_can_be_shared_by(there, chosen):
    assert elastic(4, 2).choose(HOSTS[:there]) == HOSTS[:chosen]


FAILED = Failure("Rank 1 lost the others.", "peer", 1.0)


@pytest.mark.parametrize(
    ("state", "can_begin"),
    [
        (HostState("ready"), True),  # one that came now
        (HostState("running", 2), True),
        (HostState("failed", 2, FAILED), True),  # its workers, by an echo
        (HostState("done", 2), True),
        (HostState("failed", 0, FAILED), False),  # at its check: it has left
        (HostState("failed", 1, FAILED), False),
        (HostState("stopped", 2), False),
        (HostState("absent"), False),
    ],
)
def test_a_host_can_begin_another_attempt_unless_it_has_left(link, state, can_begin):
    link.contacts["algo-3"].update(state)
    assert elastic(4, 3, 2, 1).find_present(link, 2, since=0.0) == ["algo-1", *(["algo-3"] if can_begin else [])]


def test_a_host_that_has_not_spoken_since_may_be_gone(link):
    link.contacts["algo-3"].update(HostState("running", 2))
    assert elastic(4, 3).find_present(link, 2, since=time.monotonic()) == ["algo-1"]


def test_a_host_that_died_after_an_attempt_is_lost_in_the_next(link):
    link.contacts["algo-3"].update(HostState("failed", 1, FAILED))
    link.contacts["algo-3"].broken_at = time.monotonic() - 60
    assert link.state("algo-3", attempt=1).phase == "failed"
    assert link.state("algo-3", attempt=2).phase == "lost"


@pytest.mark.parametrize(
    ("absent", "may_begin"), [(["algo-4"], True), (["algo-3", "algo-4"], False), (["algo-1"], False)]
)
def test_hosts_that_never_came_are_missed_where_too_few_are_left_or_the_first_one_is(absent, may_begin):
    link = ClusterLink(HOSTS, "algo-2", b"")
    failure = judge_absence(link, absent, elastic(4, 3))
    assert (failure is None) == may_begin
    assert failure is None or failure.reason.startswith(f"Host {', '.join(absent)} could not be reached from algo-2")


def test_all_have_to_come_where_min_hosts_is_not_given(link):
    assert judge_absence(link, ["algo-4"], Quorum(HOSTS, [4], 5.0)).kind == "lost"


OTHER = digest_facts({"seed": "2"})


def test_a_host_that_comes_later_with_other_settings_is_no_member_of_an_attempt(link):
    link.facts = {"seed": "1"}
    link.contacts["algo-2"].update(HostState("ready", facts=digest_facts(link.facts)))
    link.contacts["algo-3"].update(HostState("ready", facts=OTHER))
    assert elastic(4, 3, 2, 1).find_present(link, 2, since=0.0) == ["algo-1", "algo-2"]


@pytest.mark.parametrize(("phase", "refuses_itself"), [("running", True), ("ready", False)])
def test_a_host_that_comes_later_refuses_itself_and_before_the_start_the_first_host_judges(phase, refuses_itself):
    link = ClusterLink(HOSTS, "algo-2", b"")
    link.facts = {"seed": "1"}
    link.contacts["algo-1"].update(HostState(phase, facts=OTHER))
    failure = compare_facts(link)
    assert (failure is not None) == refuses_itself
    assert not failure or failure.reason.startswith("Host algo-1 differs from algo-2 in seed (1 on algo-2): give all")
