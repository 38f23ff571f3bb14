# SPDX-License-Identifier: Apache-2.0
"""The hosts that are there: at the start of a job, and with `min_hosts` at each further attempt.

The first training host chooses with whom an attempt is made. Hosts that came too late for it, or that its global batch
cannot be shared with, wait for the next one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.common.errors import Failure, choose_cause
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Quorum:
    """The hosts with which a job may train."""

    trainers: Sequence[str]  # all that were to train, the first host first
    counts: Sequence[int]  # how many of them may, the most first
    timeout: float  # seconds to wait for those that are missing
    goes_on_without: bool = False  # a lost host does not end the job

    def choose(self, there: Sequence[str]) -> tuple[str, ...]:
        """Return the hosts to train with, of those that are there: none where they are too few."""
        count = next((count for count in self.counts if count <= len(there)), 0)
        return tuple(there[:count])

    def find_present(self, link: ClusterLink, attempt: int, since: float) -> list[str]:
        """List the hosts that may begin another attempt after this one, by what the first host knows.

        They have said something `since` then, by `time.monotonic`.
        """
        return [
            name
            for name in self.trainers
            if name == link.own or (link.has_heard(name, since) and can_begin(link, name, attempt))
        ]


def can_begin(link: ClusterLink, name: str, attempt: int) -> bool:
    """Tell whether another host waits for an attempt, or has not left since the last one, with this job's settings."""
    state = link.state(name, attempt)
    has_ended = state.phase in ("failed", "done") and state.attempt >= max(1, attempt)
    return (state.phase in ("ready", "running") or has_ended) and not link.compare_facts([name])


def wait_for_all_hosts(
    link: ClusterLink, own_failure: Failure | None, quorum: Quorum, stop_file: Path, attempt: int = 0
) -> Failure | None:
    """Wait until every host is there, or the job trains without the others, for `quorum.timeout` seconds at most.

    `attempt` is the last one that this host has made, under another first host. Returns the failure of one of them,
    this one included, or of those that never came where too few are there.
    """
    link.publish(HostState("failed", failure=own_failure) if own_failure else HostState("ready", attempt))
    failure = own_failure
    deadline = time.monotonic() + quorum.timeout
    while not stop_file.exists() and (absent := link.find_absent()) and time.monotonic() < deadline:
        if link.is_double or link.state(link.hub).phase == "running":
            break
        time.sleep(POLL_SECONDS)
    if not stop_file.exists() and absent and failure is None:
        failure = judge_absence(link, absent, quorum)
    states = [link.state(name) for name in link.names]
    if link.own == link.hub:
        failures = [state.failure for state in states if state.attempt == 0]  # later ones are of an earlier first host
        failure = choose_cause(filter(None, [failure, *failures]))
    failure = failure or compare_facts(link)
    is_under_way = attempt == 0 and any(state.attempt for state in states)
    if failure and link.own == link.hub and not is_under_way:  # then the others wait for a first host that can lead
        link.publish(HostState("failed", failure=failure))
    return failure


def compare_facts(link: ClusterLink) -> Failure | None:
    """Return the failure of a host that does not have alike what all must, None where they agree.

    The first host judges before the start, for all. One that comes later judges itself, and the others do without it.
    """
    others = [name for name in link.names if name != link.own]
    if link.own != link.hub:
        others = [link.hub] if link.state(link.hub).phase == "running" else []
    text = link.compare_facts(others)
    return Failure(text, "mistake", time.time()) if text else None


def judge_absence(link: ClusterLink, absent: list[str], quorum: Quorum) -> Failure | None:
    """Return the failure of a job whose hosts did not all come in time; None where it may train without them."""
    there = [name for name in quorum.trainers if name not in absent]
    if not quorum.goes_on_without or not quorum.choose(there) or link.hub in absent or link.is_double:
        return describe_absence(link, absent, quorum.timeout)
    if link.own == link.hub:
        log.warning(f"Host {', '.join(absent)} did not come within {quorum.timeout:.0f} s: the others begin.")
    return None


def wait_for_trainers(link: ClusterLink, stop_file: Path) -> Failure | None:
    """Keep a host that does not train until those that do are at their end. Return their failure, if they failed."""
    link.publish(HostState("done"))
    while True:
        hub = link.state(link.hub)
        if hub.phase == "lost":
            return advise_restart(describe_loss(link.hub))
        if hub.is_final:
            return hub.failure
        if stop_file.exists() and hub.phase in ("absent", "ready"):
            return None
        time.sleep(POLL_SECONDS)


def describe_absence(link: ClusterLink, absent: list[str], timeout: float) -> Failure:
    """Return the failure of a job whose hosts did not all come within `timeout` seconds."""
    if link.is_double:
        text = f"Two machines have called {link.hub} as {link.own}: give each machine of the job a rank of its own."
        return Failure(text, "mistake", time.time())
    why = f" ({link.error.strerror or link.error})" if link.error else ""
    why += "".join(f" (and {host} is there twice, also as {address})" for host, address in link.doubles.items())
    why += f" ({link.foreign_call})" if link.foreign_call else ""
    return Failure(
        f"Host {', '.join(absent)} could not be reached from {link.own} within {timeout:.0f} s{why}: see its log; "
        "and let the hosts reach each other on every port (the job's security groups).",
        "lost",
        time.time(),
    )


def describe_loss(host: str) -> Failure:
    """Return the failure of a job, or of an attempt, that lost a host."""
    reason = f"Host {host} no longer answers: its container was killed or its machine failed."
    return Failure(reason, "lost", time.time())


def advise_restart(failure: Failure) -> Failure:
    """Return the failure of a job that a lost host has ended, with what the user can do."""
    return replace(failure, reason=f"{failure.reason} Start the job again; it goes on from the newest checkpoint.")
