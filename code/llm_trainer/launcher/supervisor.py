# SPDX-License-Identifier: Apache-2.0
"""Runs a job's worker processes to their end, in step with the other hosts, and again after a fault if allowed.

The first training host decides, when it knows how all others are: to go on, to begin another attempt, or that the job
has failed, and why. The others report and follow. A stop that reaches a host before its workers train (gate.py) ends
the workers of all hosts at once; a later one they obey themselves.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from llm_trainer.common.errors import Failure, choose_cause, read_failures
from llm_trainer.job.start_gate import StartGate
from llm_trainer.launcher.cluster import ClusterLink, HostState

POLL_SECONDS = 0.1
SETTLE_SECONDS = 10.0  # the cause of a failure may come after its echo
INTRODUCTION_SECONDS = 20.0  # containers of a job start within this of each other, when all is well
LEAVE_SECONDS = 120.0  # when all is written, the first host waits no longer than this for the others
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, for all hosts."""

    what: Literal["done", "stopped", "again", "failed"]  # stopped: before the training began
    failure: Failure | None = None


class Supervisor:
    """The life of this host's workers.

    `start` begins an attempt, after the failure of the one before, and returns the process that starts the workers;
    `find_gpu_faults` gives sentences about what GPUs of this host reported lately.
    """

    def __init__(
        self,
        hosts: ClusterLink,
        trainers: Sequence[str],
        start: Callable[[int, Failure | None], "subprocess.Popen[bytes]"],
        find_gpu_faults: Callable[[], list[str]],
        failures_dir: Path,
        stop_file: Path,
        gate: StartGate,
        max_restarts: int,
    ) -> None:
        self.hosts = hosts
        self.others = [name for name in trainers if name != hosts.own]
        self.start = start
        self.find_gpu_faults = find_gpu_faults
        self.failures_dir = failures_dir
        self.stop_file = stop_file
        self.gate = gate
        self.restarts_left = max_restarts

    def run(self) -> Verdict:
        """Attempt after attempt, until the job is done, stopped, or has failed for good."""
        attempt, earlier = 1, None
        while True:
            for file in self.failures_dir.iterdir():
                file.unlink()
            self.gate.reset()
            self.hosts.publish(HostState("running", attempt))
            child = self.start(attempt, earlier)
            try:
                verdict = (self.lead if self.hosts.own == self.hosts.hub else self.follow)(child, attempt)
            finally:
                end_processes(child)
            if verdict.what != "again":
                self.hosts.publish(HostState(verdict.what, attempt, verdict.failure))
                return verdict
            attempt, earlier = attempt + 1, verdict.failure
            self.restarts_left -= 1
            cause = f"{verdict.failure.reason}\n" if verdict.failure else ""
            print(f"{cause}Attempt {attempt}: the workers start again from the newest checkpoint.", flush=True)

    def lead(self, child: "subprocess.Popen[bytes]", attempt: int) -> Verdict:
        done_at = None
        while True:
            states = self.states_of_others()
            if self.stops_early() or any(state.phase == "stopped" for state in states.values()):
                return Verdict("stopped")
            exit_code = child.poll()
            if exit_code or any(has_failed(state, attempt) for state in states.values()):
                return self.judge(self.find_cause(child, attempt))
            if exit_code == 0:
                done_at = done_at or time.monotonic()
                if all(state.phase == "done" for state in states.values()):
                    return Verdict("done")
                if time.monotonic() - done_at > LEAVE_SECONDS:
                    print("Warning: a host has not ended, though all is written: leaving without it.", flush=True)
                    return Verdict("done")
            time.sleep(POLL_SECONDS)

    def follow(self, child: "subprocess.Popen[bytes]", attempt: int) -> Verdict:
        own: Failure | None = None
        has_reported = False
        while True:
            hub = self.hosts.state(self.hosts.hub)
            if self.stops_early():
                has_reported = True
                self.hosts.publish(HostState("stopped", attempt))
            if child.poll() is not None and not has_reported:
                has_reported = True
                own = self.own_failure(child)
                self.hosts.publish(HostState("failed" if own else "done", attempt, own))
            if hub.phase == "lost":
                return Verdict("failed", choose_cause(filter(None, [own, describe_loss(self.hosts.hub)])))
            if hub.phase == "failed":
                return Verdict("failed", hub.failure)
            if hub.phase == "stopped":
                return Verdict("stopped")
            if hub.phase == "running" and hub.attempt > attempt:
                return Verdict("again")
            if hub.phase == "done":
                return Verdict("failed", own) if own else Verdict("done")
            time.sleep(POLL_SECONDS)

    def stops_early(self) -> bool:
        """Whether a stop has just come in time: before this host's workers train, which now they will not."""
        return self.stop_file.exists() and self.gate.close()

    def states_of_others(self) -> dict[str, HostState]:
        return {name: self.hosts.state(name) for name in self.others}

    def find_cause(self, child: "subprocess.Popen[bytes]", attempt: int) -> Failure:
        """Why the attempt failed. Echoes of a failure elsewhere come first: they are given time to be explained."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            states = self.states_of_others()
            known = [state.failure for state in states.values() if state.failure and state.attempt == attempt]
            known += [describe_loss(name) for name, state in states.items() if state.phase == "lost"]
            if child.poll() is not None:
                known += filter(None, [self.own_failure(child)])
            cause = choose_cause(known)
            if cause and (cause.kind != "peer" or not self.others or time.monotonic() > deadline):
                return cause
            time.sleep(POLL_SECONDS)

    def own_failure(self, child: "subprocess.Popen[bytes]") -> Failure | None:
        """Why this host's workers failed; None if they did not."""
        if child.returncode == 0:
            return None
        how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "failed"
        reason = f"The process that starts the workers {how}: the log above holds its last lines."
        failure = choose_cause(read_failures(self.failures_dir)) or Failure(reason, "fault", time.time())
        if failure.kind == "mistake":
            return failure
        return replace(failure, reason=" ".join([failure.reason, *self.find_gpu_faults()]))

    def judge(self, cause: Failure) -> Verdict:
        """A mistake would be made again, a lost host does not come back, and who asked for a stop wants no restart."""
        is_repairable = cause.kind in ("fault", "peer") and not self.stop_file.exists()
        return Verdict("again" if is_repairable and self.restarts_left > 0 else "failed", cause)


def has_failed(state: HostState, attempt: int) -> bool:
    """A host that has yet to hear of this attempt still tells of the last one's failure."""
    return state.phase == "lost" or (state.phase == "failed" and state.attempt == attempt)


def wait_for_all_hosts(
    hosts: ClusterLink, own_failure: Failure | None, timeout: float, stop_file: Path
) -> Failure | None:
    """Wait until every host is there. The failure of one of them, this one included, or of those that never came."""
    hosts.publish(HostState("failed", failure=own_failure) if own_failure else HostState("ready"))
    failure = own_failure
    deadline = time.monotonic() + timeout
    while not stop_file.exists() and (absent := hosts.find_absent()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if not stop_file.exists() and absent and failure is None:
        failure = describe_absence(hosts, absent, timeout)
    if hosts.own == hosts.hub:
        states = [hosts.state(name) for name in hosts.names]
        failure = choose_cause(filter(None, [failure, *(state.failure for state in states)]))
        if failure:
            hosts.publish(HostState("failed", failure=failure))
    return failure


def wait_for_trainers(hosts: ClusterLink, stop_file: Path) -> Failure | None:
    """A host that does not train stays until those that do are at their end."""
    hosts.publish(HostState("done"))
    while True:
        hub = hosts.state(hosts.hub)
        if hub.phase == "lost":
            return describe_loss(hosts.hub)
        if hub.is_final:
            return hub.failure
        if stop_file.exists() and hub.phase in ("absent", "ready"):
            return None
        time.sleep(POLL_SECONDS)


def describe_absence(hosts: ClusterLink, absent: list[str], timeout: float) -> Failure:
    why = f" ({hosts.error.strerror or hosts.error})" if hosts.error else ""
    return Failure(
        f"Host {', '.join(absent)} could not be reached from {hosts.own} within {timeout:.0f} s{why}: see its log; "
        "and let the hosts reach each other on every port (the job's security groups).",
        "lost",
        time.time(),
    )


def describe_loss(host: str) -> Failure:
    return Failure(
        f"Host {host} no longer answers: its container was killed or its machine failed. Start the job again; "
        "it goes on from the newest checkpoint.",
        "lost",
        time.time(),
    )


def end_processes(child: "subprocess.Popen[bytes]") -> None:
    """Kill the process that started the workers, and these, and wait until they are gone, since they hold the GPUs."""
    if child.poll() is None:
        workers = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        child.wait()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):  # it has died with its parent
                worker.kill()
        psutil.wait_procs(workers, timeout=KILL_SECONDS)
