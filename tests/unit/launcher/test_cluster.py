# SPDX-License-Identifier: Apache-2.0
"""Hosts hear of each other over real connections; three addresses of the loopback interface stand for them."""

import json
import socket
import threading
import time

import pytest

from llm_trainer.common.errors import Failure
from llm_trainer.launcher import cluster
from llm_trainer.launcher.cluster import ClusterLink, HostState
from support.waiting import GUARD_SECONDS, wait_until

NAMES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


@pytest.fixture
def three(monkeypatch):
    with socket.socket() as free:
        free.bind(("", 0))
        monkeypatch.setattr(cluster, "PORT", free.getsockname()[1])
    with (
        ClusterLink(NAMES, NAMES[0]) as hub,
        ClusterLink(NAMES, NAMES[1]) as second,
        ClusterLink(NAMES, NAMES[2]) as third,
    ):
        yield hub, second, third


def test_all_know_who_is_not_there_yet(three):
    hub, second, third = three
    hub.publish(HostState("ready"))
    second.publish(HostState("ready"))
    wait_until(lambda: hub.find_absent() == [NAMES[2]])
    wait_until(lambda: second.find_absent() == [NAMES[2]])
    third.publish(HostState("ready"))
    wait_until(lambda: not any(host.find_absent() for host in three))


def test_the_hub_hears_a_failure_and_the_others_its_verdict(three):
    hub, second, third = three
    failure = Failure("Rank 1 broke", "fault", 12.5)
    second.publish(HostState("failed", 1, failure))
    wait_until(lambda: hub.state(NAMES[1]).failure == failure)
    hub.publish(HostState("failed", 1, failure))
    wait_until(lambda: third.state(NAMES[0]) == HostState("failed", 1, failure))


def test_a_host_that_is_gone_is_lost_unless_it_was_at_its_end(three, monkeypatch):
    monkeypatch.setattr(cluster, "RECONNECT_SECONDS", 0.1)
    hub, second, third = three
    second.publish(HostState("running", 1))
    third.publish(HostState("done", 1))
    wait_until(lambda: hub.state(NAMES[1]).phase == "running" and hub.state(NAMES[2]).phase == "done")
    for host in (second, third):
        host.__exit__()
    wait_until(lambda: hub.state(NAMES[1]).phase == "lost")
    assert hub.state(NAMES[2]).phase == "done"


def test_a_host_that_falls_silent_is_lost(three, monkeypatch):
    hub, second, _ = three
    second.publish(HostState("running", 1))
    wait_until(lambda: hub.state(NAMES[1]).phase == "running")
    monkeypatch.setattr(cluster, "SILENCE_SECONDS", -1.0)
    assert hub.state(NAMES[1]).phase == "lost"


def test_a_broken_connection_is_made_again(three):
    hub, second, _ = three
    second.publish(HostState("running", 1))
    wait_until(lambda: hub.state(NAMES[1]).phase == "running")
    second.lines[NAMES[0]].shutdown(socket.SHUT_RDWR)
    second.publish(HostState("running", 2))
    wait_until(lambda: hub.state(NAMES[1]) == HostState("running", 2))


def test_strangers_and_noise_are_not_heard(three):
    hub, second, _ = three
    for words in (b'{"host": "stranger", "state": {}}\n', b"GET / HTTP/1.1\n", b'{"host": "127.0.0.2"}\n', b"[]\n"):
        with socket.create_connection((NAMES[0], cluster.PORT)) as line:
            line.sendall(words)
    second.publish(HostState("ready"))
    wait_until(lambda: hub.state(NAMES[1]).phase == "ready")


def test_a_host_alone_opens_nothing():
    with ClusterLink(["algo-1"], "algo-1") as alone:
        alone.publish(HostState("ready"))
        assert not alone.find_absent()


def test_records_of_the_others_come_to_the_hub_with_their_time(three):
    hub, second, third = three
    heard = []
    hub.accept_records(heard.append)
    before = time.time()
    second.send_record("system", host=NAMES[1], values={"cpu_percent": 12.5})
    third.send_record("event", host=NAMES[2], text="a word")
    wait_until(lambda: len(heard) == 2)
    first = next(record for record in heard if record["kind"] == "system")
    assert before - 1 <= first.pop("time") <= time.time() + 1
    assert first == {"kind": "system", "host": NAMES[1], "values": {"cpu_percent": 12.5}}


def test_the_last_records_are_delivered_before_a_host_leaves(three):
    hub, second, _ = three
    heard = []
    hub.accept_records(heard.append)
    for number in range(100):
        second.send_record("system", number=number)
    second.__exit__()
    wait_until(lambda: len(heard) == 100)
    assert [record["number"] for record in heard] == [*range(100)]


def test_a_hub_that_takes_records_slowly_still_hears_that_their_host_lives(three, monkeypatch):
    hub, second, _ = three
    stuck = threading.Event()
    hub.accept_records(lambda record: stuck.wait(GUARD_SECONDS))
    monkeypatch.setattr(cluster, "MAX_RETRY_SECONDS", 0.01)
    for _ in range(cluster.MAX_WAITING_RECORDS * 3):
        second.send_record("system", text="x" * 100_000)
    assert len(second.records) <= cluster.MAX_WAITING_RECORDS
    second.publish(HostState("running", 7))
    wait_until(lambda: hub.state(NAMES[1]) == HostState("running", 7))
    stuck.set()


def test_records_of_strangers_and_of_other_kinds_are_not_taken(three):
    hub, second, _ = three
    heard = []
    hub.accept_records(heard.append)
    for words in (
        {"host": "stranger", "record": {"kind": "system"}},
        {"host": NAMES[1], "record": {"kind": "end"}},
        {"host": NAMES[1], "record": []},
    ):
        with socket.create_connection((NAMES[0], cluster.PORT)) as line:
            line.sendall(json.dumps(words).encode() + b"\n")
            line.shutdown(socket.SHUT_WR)
            line.recv(1)  # the hub has read it and closed
    second.send_record("system", last=True)
    wait_until(lambda: any("last" in record for record in heard))
    assert len(heard) == 1
