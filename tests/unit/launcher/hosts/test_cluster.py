# SPDX-License-Identifier: Apache-2.0
"""Hosts hear of each other over real connections; three addresses of the loopback interface stand for them."""

import json
import select
import socket
import threading
import time
from contextlib import suppress

import pytest

from llm_trainer.common.errors import Failure, UserError
from llm_trainer.launcher.hosts import cluster, greeting
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState
from llm_trainer.launcher.hosts.greeting import Visitor, introduce
from support.waiting import GUARD_SECONDS, wait_until

NAMES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
KEY = b"of the job"
KNOWN = {}  # the process of each host, by its name


@pytest.fixture
def three(monkeypatch):
    with socket.socket() as free:
        free.bind(("", 0))
        monkeypatch.setattr(cluster, "PORT", free.getsockname()[1])
    with (
        ClusterLink(NAMES, NAMES[0], KEY) as hub,
        ClusterLink(NAMES, NAMES[1], KEY) as second,
        ClusterLink(NAMES, NAMES[2], KEY) as third,
    ):
        KNOWN.update({link.own: link.visitor for link in (hub, second, third)})
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


def call(name=None, key=KEY):
    """Return a connection to the hub, as a host of that name where one is given."""
    line = socket.create_connection((NAMES[0], cluster.PORT))
    if name:
        introduce(line, key, KNOWN.get(name, Visitor(name)))
    return line


def is_closed(line):
    """Wait until the hub has closed a connection; True then."""
    line.settimeout(GUARD_SECONDS)
    with suppress(ConnectionResetError):
        while line.recv(4096):
            pass
    return True


@pytest.mark.parametrize(
    "words",
    [
        b'{"host": "127.0.0.2", "state": {"phase": "failed", "attempt": 1, "failure": null}}\n',
        b'{"host": "127.0.0.2", "challenge": "c", "proof": "guessed"}\n',
        b'{"host": "stranger", "challenge": "c", "proof": "guessed"}\n',
        b"GET / HTTP/1.1\r\nHost: algo-1\r\n\r\n",
        b"[" * 1000 + b"\n",
        b"\xff\xfe\n",
        b"x" * 10**6,
        b"",
    ],
    ids=["no-greeting", "no-proof", "stranger", "http", "nested", "bytes", "endless", "nothing"],
)
def test_whoever_gives_no_proof_is_not_heard(three, words):
    hub, second, _ = three
    with call() as line:
        with suppress(OSError):  # the hub may have closed it already
            line.sendall(words)
            line.shutdown(socket.SHUT_WR)
        assert is_closed(line)
    assert hub.state(NAMES[1]).phase == "absent"
    second.publish(HostState("ready"))
    wait_until(lambda: hub.state(NAMES[1]).phase == "ready")


@pytest.mark.usefixtures("three")
def test_a_host_with_another_key_is_refused_and_learns_it():
    with pytest.raises(
        ConnectionRefusedError, match="it takes this host for one of another job: give all hosts the same number"
    ):
        call(NAMES[1], b"of another job")


@pytest.mark.usefixtures("three")
def test_a_proof_that_was_overheard_is_worth_nothing():
    with call() as line:
        challenge = line.makefile().readline().strip()
        process = KNOWN[NAMES[1]].process
        proof = greeting.prove(KEY, "host", NAMES[1], process, challenge)
        words = json.dumps({"host": NAMES[1], "process": process, "challenge": "c", "proof": proof}).encode() + b"\n"
        line.sendall(words)
        assert line.recv(100) == greeting.prove(KEY, "hub", "c").encode() + b"\n"
    with call() as again:
        again.recv(100)
        again.sendall(words)
        assert is_closed(again)


@pytest.mark.usefixtures("three")
def test_one_that_sends_byte_by_byte_gains_no_time(monkeypatch):
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 0.3)
    with call() as line:
        line.recv(100)
        with suppress(ConnectionError):
            while not select.select([line], [], [], 0.05)[0]:
                line.sendall(b"x")
        assert is_closed(line)


@pytest.mark.long
def test_a_thousand_connections_keep_no_host_out(three, monkeypatch):
    hub, second, third = three
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 1.0)
    monkeypatch.setattr(cluster, "MAX_RETRY_SECONDS", 0.2)
    before = threading.active_count()
    lines = []
    try:
        for _ in range(1000):
            lines.append(call())
        assert threading.active_count() - before <= cluster.MIN_STRANGERS
        second.publish(HostState("running", 3))
        wait_until(lambda: hub.state(NAMES[1]) == HostState("running", 3))
        third.lines[NAMES[0]].shutdown(socket.SHUT_RDWR)  # it has to call again
        third.publish(HostState("running", 4))
        wait_until(lambda: hub.state(NAMES[2]) == HostState("running", 4))
    finally:
        for line in lines:
            line.close()


def test_a_host_speaks_for_itself_alone_and_noise_is_passed_over(three):
    hub, second, _ = three
    second.publish(HostState("running"))
    wait_until(lambda: hub.contacts[NAMES[1]].state.phase == "running")
    heard = []
    hub.accept_records(heard.append)
    with call(NAMES[1]) as line:
        for words in (
            {"host": NAMES[2], "state": {"phase": "running", "attempt": 1, "failure": None}},
            {"host": NAMES[1], "state": {"phase": "unheard of", "attempt": 1, "failure": None}},
            {"host": NAMES[1], "state": {"phase": "failed", "attempt": "x", "failure": None}},
            {"host": NAMES[1], "state": []},
            {"host": NAMES[1], "record": {"kind": "end"}},
            {"host": NAMES[1], "record": []},
            {"kind": "of a later version"},
            [[]],
            {"host": NAMES[1], "record": {"kind": "system", "last": True}},
        ):
            line.sendall(json.dumps(words).encode() + b"\n")
        wait_until(lambda: heard)
    assert heard == [{"kind": "system", "last": True}]
    assert hub.contacts[NAMES[2]].state.phase != "running"
    assert hub.contacts[NAMES[1]].state.phase == "running"


def test_a_second_process_of_a_name_is_turned_away_and_both_sides_know(three, monkeypatch):
    monkeypatch.setattr(cluster, "RECONNECT_SECONDS", 0.5)
    hub, second, _ = three
    second.publish(HostState("ready"))
    wait_until(lambda: hub.state(NAMES[1]).phase == "ready")
    with ClusterLink(NAMES, NAMES[1], KEY) as double:
        wait_until(lambda: double.is_double)
    assert hub.doubles == {NAMES[1]: "127.0.0.1"}
    assert hub.state(NAMES[1]).phase == "ready"
    assert not second.is_double


def test_a_process_takes_the_place_of_one_that_is_gone(three):
    hub, second, _ = three
    second.publish(HostState("ready"))
    wait_until(lambda: hub.state(NAMES[1]).phase == "ready")
    second.hub_address = "127.0.0.1:gone"  # it calls no more
    second.lines[NAMES[0]].shutdown(socket.SHUT_RDWR)
    wait_until(lambda: NAMES[1] not in hub.lines)
    with ClusterLink(NAMES, NAMES[1], KEY) as other:
        other.publish(HostState("running", 3))
        wait_until(lambda: hub.state(NAMES[1]).attempt == 3)


def test_a_port_in_use_is_a_sentence(three):
    del three
    with pytest.raises(UserError, match=r"Port \d+ of this host, on which the job's hosts talk, cannot be opened"):
        ClusterLink(NAMES, NAMES[0], KEY).__enter__()


@pytest.mark.usefixtures("three")
def test_a_line_without_end_ends_the_connection():
    with call(NAMES[1]) as line:
        with suppress(ConnectionError):
            line.sendall(b"x" * (cluster.MAX_LINE_BYTES + 1))
        assert is_closed(line)


def test_a_host_alone_opens_nothing():
    with ClusterLink(["algo-1"], "algo-1", KEY) as alone:
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


def test_of_two_machines_with_one_name_that_call_at_once_the_second_is_turned_away():
    """The first one has been let in, and has said nothing yet."""
    link = ClusterLink(NAMES, NAMES[0], KEY)
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        assert not link.is_taken(first, Visitor(NAMES[1], "one"), "10.0.0.1")
        assert link.is_taken(second, Visitor(NAMES[1], "two"), "10.0.0.2")
        assert not link.is_taken(third, Visitor(NAMES[1], "one"), "10.0.0.1")  # its second connection
    assert link.doubles == {NAMES[1]: "10.0.0.2"}


def test_another_machine_may_have_the_name_of_one_that_is_silent():
    link = ClusterLink(NAMES, NAMES[0], KEY)
    with socket.socket() as first, socket.socket() as second:
        assert not link.is_taken(first, Visitor(NAMES[1], "one"), "10.0.0.1")
        link.contacts[NAMES[1]].update(HostState("running", 1))
        link.contacts[NAMES[1]].heard_at -= cluster.SILENCE_SECONDS + 1
        assert not link.is_taken(second, Visitor(NAMES[1], "two"), "10.0.0.2")
