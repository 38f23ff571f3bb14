# SPDX-License-Identifier: Apache-2.0
"""Connections between the launchers of a job: hosts start together, learn of each other's end, and leave together.

A host that vanishes leaves the others in a collective that nobody answers, and whose time-out names nobody. So each
launcher keeps a connection to the hub, the first host's launcher. It says every two seconds how it is, and hears how
the hub is: one JSON object a line. Nothing holds a launcher up: silence means that its host is gone. Records for the
job's journal take a connection of their own, which may be slow or stuck without being taken for silence.
"""

import functools
import json
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from llm_trainer.common import log
from llm_trainer.common.errors import Failure, parse_failure
from llm_trainer.common.retry import Backoff
from llm_trainer.host.network import open_port
from llm_trainer.launcher.hosts.agreement import digest_facts, find_disagreement
from llm_trainer.launcher.hosts.greeting import RankTakenError, StrangerError, Visitor, admit, introduce

PORT = 7778
HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0  # a host that says nothing for so long is lost
RECONNECT_SECONDS = 5.0  # a host whose connection broke and was not made again for so long is lost too
CONNECT_SECONDS = 5.0
FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 5.0
MAX_WAITING_RECORDS = 256  # where the hub does not hear a host, its oldest records are dropped
PHASES = ("absent", "ready", "running", "done", "stopped", "failed")  # a host says of itself
MAX_LINE_BYTES = 2**20
MIN_STRANGERS = 64  # connections that may wait at a time to be known; others are closed at once
HEARD_KINDS = ("system", "event")  # the kinds of records that the hub takes from others


@dataclass(frozen=True)
class HostState:
    """The phase of a host.

    A host says of itself that it is `ready`, `running` its nth attempt, `done`, `stopped` before it trained, or
    `failed`. The others take one for `absent` before it came, and for `lost` once it no longer answers.
    """

    phase: str = "absent"
    attempt: int = 0
    failure: Failure | None = None
    is_stopping: bool = False  # its container got a stop signal
    members: tuple[str, ...] = ()  # the hosts of the attempt, as the first one has chosen them
    facts: dict[str, str] = field(default_factory=dict)  # digests of its own (hosts/agreement.py)

    @property
    def is_final(self) -> bool:
        """True once the host's part in the job is over."""
        return self.phase in ("done", "stopped", "failed", "lost")


@dataclass(frozen=True)
class Overview:
    """The hub's view of all hosts, which it tells them."""

    absent: list[str] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)  # of those that have called


def parse_message(text: str | bytes) -> tuple[str, HostState, Overview]:
    """Return who speaks, how it is, and what it sees of the others. Raises ValueError for what no launcher says."""
    try:
        words: dict[str, Any] = json.loads(text)
        state, failure = words["state"], words["state"]["failure"]
        failed = parse_failure(failure) if failure else None
        members = tuple(str(name) for name in state.get("members", ()))
        facts = {str(name): str(value) for name, value in state.get("facts", {}).items()}
        is_stopping = state.get("is_stopping") is True
        told = HostState(state["phase"], int(state["attempt"]), failed, is_stopping, members, facts)
        if told.phase not in PHASES:
            raise ValueError(f"no phase of a host: {told.phase!r}")
        return words["host"], told, Overview([*words.get("absent", [])], {**words.get("addresses", {})})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a launcher's words: {text!r}") from error


def parse_record(text: str | bytes) -> tuple[str, dict[str, Any]] | None:
    """Return who speaks and its record for the journal; None for another message. Raises ValueError for noise."""
    try:
        words = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(words, dict) or "record" not in words:
        return None
    host, record = words.get("host"), words["record"]
    if not isinstance(host, str) or not isinstance(record, dict) or record.get("kind") not in HEARD_KINDS:
        raise ValueError(f"not a launcher's record: {text!r}")
    return host, record


@dataclass
class HostContact:
    """Knowledge of another host, and when it came."""

    state: HostState = field(default_factory=HostState)
    heard_at: float = 0.0  # time.monotonic()
    broken_at: float | None = None

    def update(self, state: HostState) -> None:
        """Note what the host has just said."""
        self.state, self.heard_at, self.broken_at = state, time.monotonic(), None

    @property
    def answers(self) -> bool:
        """True while its connection holds, and it speaks."""
        now = time.monotonic()
        is_cut = self.broken_at is not None and now - self.broken_at > RECONNECT_SECONDS
        return self.state.phase != "absent" and not is_cut and now - self.heard_at <= SILENCE_SECONDS

    def judge(self, attempt: int) -> HostState:
        """Return its state, or `lost` where it was there, was not at its end, and no longer answers.

        One that failed in an attempt before this one was not at its end: it was to begin this one.
        """
        is_over = self.state.is_final and not (self.state.phase == "failed" and self.state.attempt < attempt)
        if self.state.phase == "absent" or is_over or self.answers:
            return self.state
        return HostState("lost", self.state.attempt)


class ClusterLink:
    """A host's link to the others: the hub hears every host, the others hear the hub.

    A host alone opens no connection.
    """

    def __init__(self, names: Sequence[str], own: str, key: bytes, hub_address: str | None = None) -> None:
        """Take the names of all hosts, the hub's first, this host's own, and the key of the job.

        `hub_address` is where the hub is reached, by default at its name.
        """
        self.key = key
        self.facts: dict[str, str] = {}  # of this host (hosts/agreement.py), once its job is checked
        self.hub_address = hub_address or names[0]
        self.visitor = Visitor(own)
        self.guests: dict[str, str] = {}  # host -> which of its processes is known, on the hub
        self.callers: defaultdict[str, set[socket.socket]] = defaultdict(set)  # host -> its lines, open on the hub
        self.greeting = threading.Lock()  # two machines of one name may call at once
        self.doubles: dict[str, str] = {}  # host -> address of another machine that calls itself so, on the hub
        self.foreign_call: str | None = None  # the last call on the hub that was taken for another job's
        self.is_double = False  # the hub knows another machine by this host's name
        self.strangers = threading.BoundedSemaphore(max(MIN_STRANGERS, 4 * len(names)))
        self.names = names
        self.own = own
        self.hub = names[0]
        self.contacts = {name: HostContact() for name in names}
        self.overview = Overview([name for name in names if name != own])
        self.error: OSError | None = None  # why the hub cannot be reached
        self.lines: dict[str, socket.socket] = {}
        self.changed = threading.Event()
        self.is_closing = False
        self.write_record: Callable[[dict[str, Any]], None] | None = None  # on the hub, for the others' records
        self.records: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING_RECORDS)
        self.has_records = threading.Event()

    def __enter__(self) -> Self:
        """Open the connections. Raises UserError where the hub cannot listen."""
        if len(self.names) > 1:
            if self.own == self.hub:
                self.server = open_port(PORT)
                threading.Thread(target=self.accept_connections, daemon=True).start()
            else:
                threading.Thread(target=self.stay_connected, daemon=True).start()
                self.courier = threading.Thread(target=self.deliver_records, daemon=True)
                self.courier.start()
            self.speaker = threading.Thread(target=self.send_heartbeats, daemon=True)
            self.speaker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close what is not closed yet."""
        if not self.is_closing:
            self.close()

    def close(self) -> None:
        """Say the last word, and close the connections."""
        self.is_closing = True
        if len(self.names) > 1:
            self.changed.set()
            self.speaker.join(CONNECT_SECONDS)  # the last word is said
            if self.own != self.hub:
                self.has_records.set()
                self.courier.join(CONNECT_SECONDS)
            else:
                self.server.shutdown(socket.SHUT_RDWR)  # ends the wait in accept, which closing would not
                self.server.close()
            for line in list(self.lines.values()):
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def accept_records(self, write_record: Callable[[dict[str, Any]], None]) -> None:
        """Have the records of the other hosts written from now on; only the hub gets any."""
        self.write_record = write_record

    def publish(self, state: HostState) -> None:
        """Let the others know how this host is."""
        self.contacts[self.own].update(replace(state, facts=digest_facts(self.facts)))
        self.changed.set()

    def compare_facts(self, names: Iterable[str]) -> str | None:
        """Return a sentence about those of the hosts that have something else than this one, None where all agree."""
        return find_disagreement(self.own, self.facts, {name: self.contacts[name].state.facts for name in names})

    def send_record(self, kind: str, **fields: object) -> None:
        """Have the hub write a record to the journal, without waiting for it."""
        self.records.append({"time": round(time.time(), 3), "kind": kind, **fields})
        self.has_records.set()

    def state(self, name: str, attempt: int = 0) -> HostState:
        """Return how a host is in an attempt, by what this one has heard; the hub alone has heard all."""
        contact = self.contacts[name]
        return contact.state if name == self.own else contact.judge(attempt)

    def answers(self, name: str) -> bool:
        """Tell whether a host is in touch with this one, whatever it last said."""
        return name == self.own or self.contacts[name].answers

    def has_heard(self, name: str, since: float) -> bool:
        """Tell whether another host is in touch with this one, and has spoken `since` then by `time.monotonic`."""
        return self.answers(name) and self.contacts[name].heard_at >= since

    def find_absent(self) -> list[str]:
        """List the hosts that are not there yet."""
        if self.own == self.hub:
            return [name for name, contact in self.contacts.items() if contact.state.phase == "absent"]
        return [self.hub] if self.contacts[self.hub].state.phase == "absent" else self.overview.absent

    def send_heartbeats(self) -> None:
        """Say how this host is, at every change and every heartbeat, and once more at the end."""
        while True:
            is_last = self.is_closing
            words = {"host": self.own, "state": asdict(self.contacts[self.own].state)}
            if self.own == self.hub:
                words |= asdict(replace(self.overview, absent=self.find_absent()))
            for line in list(self.lines.values()):
                with suppress(OSError):  # its listener notes that it broke
                    line.sendall(json.dumps(words).encode() + b"\n")
            if is_last:
                return
            self.changed.wait(HEARTBEAT_SECONDS)
            self.changed.clear()

    def admit_caller(self, line: socket.socket) -> None:
        """Read what a host of the job says, and close the connection of a stranger."""
        name = None
        try:
            name = admit(line, self.key, self.names, functools.partial(self.is_taken, line))
        except StrangerError as error:
            self.foreign_call = str(error)
        except OSError:
            pass  # it has left, or says too little
        finally:
            self.strangers.release()
        if name is None:
            line.close()
        else:
            self.read_messages(line, name)
        for lines in list(self.callers.values()):
            lines.discard(line)

    def is_taken(self, line: socket.socket, visitor: Visitor, address: str) -> bool:
        """Tell whether the hub is in touch with another process of that host's name, and note the newcomer if so."""
        with self.greeting:
            contact = self.contacts[visitor.host]
            is_there = self.callers[visitor.host] and (contact.state.phase == "absent" or contact.answers)
            if is_there and self.guests.get(visitor.host) != visitor.process:
                self.doubles[visitor.host] = address
                return True
            self.guests[visitor.host] = visitor.process
            self.callers[visitor.host].add(line)
        self.overview.addresses[visitor.host] = address
        return False

    def read_messages(self, line: socket.socket, name: str) -> None:
        """Read what the host of that name says, until its connection ends. What nobody understands is passed over."""
        with suppress(OSError), line, line.makefile("rb") as texts:
            while (text := texts.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                with suppress(ValueError):
                    self.hear(line, name, text)
        if self.lines.get(name) is line:
            del self.lines[name]
            self.contacts[name].broken_at = time.monotonic()

    def hear(self, line: socket.socket, name: str, text: bytes) -> None:
        """Take note of a message or a record of the host of that name. Raises ValueError for noise."""
        if found := parse_record(text):
            self.receive_record(name, found[1])
            return
        _, state, overview = parse_message(text)
        self.lines[name] = line
        if name == self.hub:
            self.overview = overview
        is_new = state.phase != self.contacts[name].state.phase
        self.contacts[name].update(state)
        if is_new:
            self.changed.set()
            if self.contacts[self.own].state.attempt and (mismatch := self.compare_facts([name])):
                log.warning(f"{mismatch} It has no part in this job.")

    def receive_record(self, sender: str, record: dict[str, Any]) -> None:
        """Hand a record of another host to whoever writes the journal."""
        if sender in self.contacts and self.write_record:
            self.write_record(record)

    def deliver_records(self) -> None:
        """Send every record to the hub, the last ones after the end too if it still listens."""
        line: socket.socket | None = None
        while True:
            self.has_records.wait()
            self.has_records.clear()
            is_last = self.is_closing
            while self.records:
                words = {"host": self.own, "record": self.records.popleft()}
                try:
                    line = line or self.call_hub()
                    line.sendall(json.dumps(words).encode() + b"\n")
                except OSError:
                    line = None
                    if self.is_closing:
                        return
                    time.sleep(MAX_RETRY_SECONDS)
            if is_last:
                return

    def accept_connections(self) -> None:
        """Start a thread for every host that calls the hub."""
        while not self.is_closing:
            try:
                line, _ = self.server.accept()
            except OSError:  # closed, or out of open files
                time.sleep(FIRST_RETRY_SECONDS)
                continue
            if self.strangers.acquire(blocking=False):
                threading.Thread(target=self.admit_caller, args=[line], daemon=True).start()
            else:
                line.close()

    def call_hub(self) -> socket.socket:
        """Return a connection to the hub, which knows this host then. Raises OSError."""
        line = socket.create_connection((self.hub_address, PORT), timeout=CONNECT_SECONDS)
        try:
            introduce(line, self.key, self.visitor)
        except OSError:
            line.close()
            raise
        return line

    def stay_connected(self) -> None:
        """Keep a connection to the hub, whose name may take minutes to resolve."""
        backoff = Backoff(FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS)
        answered_at = time.monotonic()  # by anything else than that this host's name is taken
        while not self.is_closing:
            try:
                line = self.call_hub()
            except OSError as error:
                self.error = error
                is_taken = isinstance(error, RankTakenError)  # perhaps by this host's process before this one
                answered_at = answered_at if is_taken else time.monotonic()
                self.is_double = is_taken and time.monotonic() - answered_at > RECONNECT_SECONDS
                time.sleep(backoff.note_failure())
                continue
            self.error = None
            backoff.note_success()
            self.lines[self.hub] = line
            self.changed.set()
            self.read_messages(line, self.hub)
            time.sleep(FIRST_RETRY_SECONDS)
