# SPDX-License-Identifier: Apache-2.0
"""The host that takes the place of the first one. tests/integration/test_lost_hosts.py has whole jobs."""

import pytest

from llm_trainer.config.environment import read_environment
from llm_trainer.config.placement import PUT_AWAY, Placement
from llm_trainer.launcher.hosts.agreement import digest_facts
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState, Overview
from llm_trainer.launcher.hosts.failover import can_lead, find_successor
from llm_trainer.launcher.hosts.meeting import Quorum

HOSTS = ("node-0", "node-1", "node-2", "node-3")
ADDRESSES = {"node-1": "10.0.0.1", "node-2": "10.0.0.2", "node-3": "10.0.0.3"}


def link_of(own, members):
    link = ClusterLink(HOSTS, own, b"key", "10.0.0.9")
    link.contacts["node-0"].update(HostState("running", 2, members=members))
    link.overview = Overview([], ADDRESSES)
    return link


def test_all_find_the_same_one_among_those_that_took_part():
    quorum = Quorum(HOSTS, [4, 3, 2], 5.0, goes_on_without=True)
    found = [find_successor(link_of(own, ("node-0", "node-2", "node-3")), quorum) for own in HOSTS[1:]]
    assert found[0] == found[1] == found[2]
    assert (found[0].names, found[0].address) == (["node-2", "node-3", "node-1"], "10.0.0.2")
    assert found[0].quorum.counts == quorum.counts


def test_too_few_are_left():
    assert find_successor(link_of("node-1", HOSTS), Quorum(HOSTS, [4], 5.0, goes_on_without=True)) is None


def test_the_next_attempt_is_placed_around_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    monkeypatch.delenv(PUT_AWAY, raising=False)
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "10.0.0.9"}.items():
        monkeypatch.setenv(name, value)
    environment = read_environment()
    quorum = Quorum(environment.hosts, [4, 3], 5.0, goes_on_without=True)
    link = link_of("node-2", HOSTS)
    successor = find_successor(link, quorum)
    placed = successor.place(environment)
    assert (placed.hosts, placed.node_rank, placed.first_address) == (HOSTS[1:], 1, "10.0.0.1")
    assert isinstance(placed.placement, Placement)
    link.facts = {"seed": "1"}
    new = successor.open_link(link)
    assert new.facts == link.facts  # with which it compares hosts that come later
    assert (new.hub, new.hub_address, new.own, new.key) == ("node-1", "10.0.0.1", "node-2", b"key")


@pytest.mark.parametrize(
    ("state", "leads"),
    [
        (HostState("ready", facts=digest_facts({"seed": "1"})), True),
        (HostState("ready", facts=digest_facts({"seed": "2"})), False),
        (HostState("failed"), False),  # at its check
        (HostState("failed", 2), True),  # the network was away: what it says of the job counts
        (HostState("absent"), False),
    ],
)
def test_another_first_host_leads_if_it_has_the_same_settings_and_no_mistake(state, leads):
    link = ClusterLink(HOSTS, "node-1", b"")
    link.facts = {"seed": "1"}
    link.contacts["node-0"].update(state)
    assert can_lead(link, 2) is leads
