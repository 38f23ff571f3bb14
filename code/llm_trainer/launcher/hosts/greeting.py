# SPDX-License-Identifier: Apache-2.0
"""The greeting between launchers: each proves that it belongs to the job, before anything else that it says is read.

The port of the first host is open to whoever reaches it. The proofs are HMACs over the other side's fresh random text,
so that one that was overheard is worth nothing. Their key is derived from what all hosts of a job are given. Without a
secret among that, whoever knows the job's ARN and hosts can derive it too.
"""

import hashlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llm_trainer.config.secret_references import VARIABLES

GREETING_SECONDS = 5.0  # for all of it: a peer that sends byte by byte gains nothing
MAX_GREETING_BYTES = 1024
JOB_VARIABLES = ("TRAINING_JOB_NAME", "TRAINING_JOB_ARN", "SLURM_JOB_ID")
DIFFERENT_JOB = "give all hosts the same number of hosts, job name and secrets"
TAKEN = "taken"  # the hub's answer to a second machine that calls itself by the same name


@dataclass(frozen=True)
class Visitor:
    """A host that calls the hub, and which of its processes it is: two machines may have been given one rank."""

    host: str
    process: str = field(default_factory=lambda: secrets.token_hex(8))


class RankTakenError(ConnectionRefusedError):
    """The hub is in touch with another process of this host's name."""


class StrangerError(ConnectionRefusedError):
    """A launcher calls that was given another job's facts, or other ones of this job."""


def derive_key(hosts: Sequence[str], variables: Mapping[str, str]) -> bytes:
    """Return the key of a job: from its hosts, its name, and the secrets in its environment."""
    facts = [[*hosts], [variables.get(name, "") for name in (*JOB_VARIABLES, *VARIABLES)]]
    return hashlib.sha256(json.dumps(facts).encode()).digest()


def prove(key: bytes, *texts: str) -> str:
    """Return the proof of knowing the key for these texts, in hexadecimal."""
    return hmac.new(key, json.dumps(texts).encode(), hashlib.sha256).hexdigest()


def admit(
    line: socket.socket, key: bytes, names: Sequence[str], is_taken: Callable[[Visitor, str], bool]
) -> str | None:
    """Return the host of the job that calls, None for what is no launcher, or one that is turned away.

    Raises StrangerError for a launcher of another job, and OSError where the connection breaks.

    `is_taken` tells whether another process has the visitor's name, who calls from an address: it is turned away.
    """
    challenge, deadline = secrets.token_hex(16), time.monotonic() + GREETING_SECONDS
    address = str(line.getpeername()[0])
    line.settimeout(GREETING_SECONDS)
    line.sendall(f"{challenge}\n".encode())
    try:
        words = json.loads(read_line(line, deadline))
        host, process, challenge_of_host, proof = (
            str(words[name]) for name in ("host", "process", "challenge", "proof")
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    expected = prove(key, "host", host, process, challenge)
    if host not in names or not hmac.compare_digest(expected.encode(), proof.encode()):
        raise StrangerError(f"{address} calls as a host of another job: {DIFFERENT_JOB}")
    if is_taken(Visitor(host, process), address):
        line.sendall(f"{prove(key, TAKEN, challenge_of_host)}\n".encode())
        return None
    line.sendall(f"{prove(key, 'hub', challenge_of_host)}\n".encode())
    line.settimeout(None)
    return host


def introduce(line: socket.socket, key: bytes, visitor: Visitor) -> None:
    """Prove to the hub that this host belongs to the job, and have it prove the same. Raises OSError otherwise."""
    challenge, deadline = secrets.token_hex(16), time.monotonic() + GREETING_SECONDS
    line.settimeout(GREETING_SECONDS)
    challenge_of_hub = read_line(line, deadline)
    if not challenge_of_hub:
        raise ConnectionResetError("it has closed the connection")  # too many call at a time
    words = {"host": visitor.host, "process": visitor.process, "challenge": challenge}
    words["proof"] = prove(key, "host", visitor.host, visitor.process, challenge_of_hub)
    line.sendall(json.dumps(words).encode() + b"\n")
    answer = read_line(line, deadline)
    if hmac.compare_digest(answer.encode(), prove(key, TAKEN, challenge).encode()):
        raise RankTakenError("another machine of the job has this one's rank")
    if not hmac.compare_digest(answer.encode(), prove(key, "hub", challenge).encode()):
        raise ConnectionRefusedError(f"it takes this host for one of another job: {DIFFERENT_JOB}")
    line.settimeout(None)


def read_line(line: socket.socket, deadline: float) -> str:
    """Return a line of the greeting, empty where the other side closes. Raises TimeoutError when its time is up."""
    read = bytearray()
    while len(read) < MAX_GREETING_BYTES:
        line.settimeout(max(0.001, deadline - time.monotonic()))
        byte = line.recv(1)  # no more than the line: what follows it is read by others
        if byte in (b"\n", b""):
            break
        read += byte
        if time.monotonic() > deadline:
            raise TimeoutError("no greeting")
    return read.decode("utf-8", errors="replace")
