# SPDX-License-Identifier: Apache-2.0
"""Run a job's worker processes to their end, in step with the other hosts, and again after a fault if allowed.

The first training host knows how all others are, and decides: to go on, to begin another attempt, or that the job has
failed. The others report and follow. A stop that reaches a host before its workers train ends the workers of all hosts
at once. After that (job/start_gate.py) the workers obey a stop themselves.
"""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from llm_trainer.common import log
from llm_trainer.common.errors import Failure, Wait, choose_cause, read_failures
from llm_trainer.job.rank_traces import REPORT_SECONDS, RankTraces
from llm_trainer.job.start_gate import StartGate
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState

POLL_SECONDS = 0.1
SETTLE_SECONDS = REPORT_SECONDS + 10.0  # the cause of a failure may come after its echo
INTRODUCTION_SECONDS = 20.0  # containers of a job start within this of each other, when all is well
LEAVE_SECONDS = 120.0  # when all is written, the first host waits no longer than this for the others
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Verdict:
    """The end of an attempt, for all hosts."""

    what: Literal["done", "stopped", "again", "failed"]  # stopped: before the training began
    failure: Failure | None = None


@dataclass(frozen=True)
class HostWorkers:
    """The workers of this host, as the supervisor needs them."""

    # Starts the nth attempt, after the failure of the one before, and returns the process that starts the workers.
    start: Callable[[int, Failure | None], "subprocess.Popen[bytes]"]
    find_gpu_faults: Callable[[], list[str]]  # sentences about what GPUs of this host reported lately
    traces: RankTraces


@dataclass(frozen=True)
class AttemptSignals:
    """The files through which launcher and workers of a host speak."""

    failures_dir: Path
    stop_file: Path
    gate: StartGate

    def stops_early(self) -> bool:
        """Tell whether a stop came in time: before this host's workers train, which now they will not."""
        return self.stop_file.exists() and self.gate.close()

    def reset(self) -> None:
        """Remove what the attempt before left."""
        for file in self.failures_dir.iterdir():
            file.unlink()
        self.gate.reset()


class Supervisor:
    """The life of this host's workers."""

    def __init__(
        self,
        link: ClusterLink,
        trainers: Sequence[str],
        workers: HostWorkers,
        signals: AttemptSignals,
        max_restarts: int,
    ) -> None:
        """Take the names of the hosts that train, and how often workers may be restarted."""
        self.link = link
        self.others = [name for name in trainers if name != link.own]
        self.workers = workers
        self.signals = signals
        self.restarts_left = max_restarts
        self.began = 0.0  # of the attempt, in seconds since the epoch

    def run(self) -> Verdict:
        """Run attempt after attempt, until the job is done, stopped, or has failed for good."""
        attempt, earlier = 1, None
        self.workers.traces.make_folder()
        while True:
            self.signals.reset()
            self.began = time.time()
            self.link.publish(HostState("running", attempt))
            child = self.workers.start(attempt, earlier)
            try:
                verdict = (self.lead if self.link.own == self.link.hub else self.follow)(child, attempt)
            finally:
                end_processes(child)
            if verdict.what != "again":
                self.link.publish(HostState(verdict.what, attempt, verdict.failure))
                return verdict
            attempt, earlier = attempt + 1, verdict.failure
            self.restarts_left -= 1
            cause = f"{verdict.failure.reason}\n" if verdict.failure else ""
            log.info(f"{cause}Attempt {attempt}: the workers start again from the newest checkpoint.")

    def lead(self, child: "subprocess.Popen[bytes]", attempt: int) -> Verdict:
        """Watch all hosts from the first one, and decide how the attempt ends."""
        done_at = None
        while True:
            states = self.read_states()
            self.join_stop(states)
            if self.signals.stops_early() or any(state.phase == "stopped" for state in states.values()):
                return Verdict("stopped")
            exit_code = child.poll()
            if exit_code or any(has_failed(state, attempt) for state in states.values()):
                return self.judge(self.find_cause(child, attempt))
            if exit_code == 0:
                done_at = done_at or time.monotonic()
                if all(state.phase == "done" for state in states.values()):
                    return Verdict("done")
                if time.monotonic() - done_at > LEAVE_SECONDS:
                    log.warning("a host has not ended, though all is written: leaving without it.")
                    return Verdict("done")
            time.sleep(POLL_SECONDS)

    def follow(self, child: "subprocess.Popen[bytes]", attempt: int) -> Verdict:
        """Report how this host is, and end the attempt as the first host says."""
        own: Failure | None = None
        has_reported = False
        while True:
            hub = self.link.state(self.link.hub)
            if self.signals.stops_early():
                has_reported = True
                self.link.publish(HostState("stopped", attempt))
            if child.poll() is not None and not has_reported:
                has_reported = True
                own = self.explain_end(child)
                self.link.publish(HostState("failed" if own else "done", attempt, own))
            self.tell_stop()
            verdict = obey(hub, self.link.hub, attempt, own)
            if verdict is not None:
                return verdict
            time.sleep(POLL_SECONDS)

    def join_stop(self, states: Mapping[str, HostState]) -> None:
        """Stop this host too where another one got a signal: this one exports, when the others have no workers left."""
        stopping = [name for name, state in states.items() if state.is_stopping]
        if stopping and not self.signals.stop_file.exists():
            log.info(f"Host {stopping[0]} got a stop signal: this host stops, too.")
            self.signals.stop_file.touch()

    def tell_stop(self) -> None:
        """Tell the first host of a stop signal to this one."""
        state = self.link.state(self.link.own)
        if self.signals.stop_file.exists() and not state.is_stopping:
            self.link.publish(replace(state, is_stopping=True))

    def read_states(self) -> dict[str, HostState]:
        """Return how the other training hosts are."""
        return {name: self.link.state(name) for name in self.others}

    def find_cause(self, child: "subprocess.Popen[bytes]", attempt: int) -> Failure:
        """Return why the attempt failed. Echoes of a failure elsewhere come first: they get time to be explained."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            states = self.read_states()
            known = [state.failure for state in states.values() if state.failure and state.attempt == attempt]
            known += [describe_loss(name) for name, state in states.items() if state.phase == "lost"]
            has_ended = child.poll() is not None
            if has_ended:
                known += filter(None, [self.explain_end(child)])
            cause = choose_cause(known)
            all_told = has_ended and all(has_failed(state, attempt) for state in states.values())
            if cause and (cause.kind != "peer" or all_told or time.monotonic() > deadline):
                waits = [wait for failure in known for wait in failure.waits]
                return self.workers.traces.blame_missing_ranks(cause, [*waits, *self.read_waits()])
            time.sleep(POLL_SECONDS)

    def explain_end(self, child: "subprocess.Popen[bytes]") -> Failure | None:
        """Return why this host's workers failed; None if they did not."""
        if child.returncode == 0:
            return None
        how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "failed"
        reason = f"The process that starts the workers {how}: the log above holds its last lines."
        failure = choose_cause(read_failures(self.signals.failures_dir)) or Failure(reason, "fault", time.time())
        if failure.kind == "mistake":
            return failure
        waits = tuple(self.read_waits()) if failure.kind == "peer" else ()
        return replace(failure, reason=" ".join([failure.reason, *self.workers.find_gpu_faults()]), waits=waits)

    def read_waits(self) -> list[Wait]:
        """Return what ranks of this host waited for when this attempt failed."""
        told = [wait for failure in read_failures(self.signals.failures_dir) for wait in failure.waits]
        return [*told, *self.workers.traces.read_waits(self.began)]

    def judge(self, cause: Failure) -> Verdict:
        """Decide whether another attempt makes sense.

        A mistake would be made again, a lost host does not come back, and who asked for a stop wants no restart.
        """
        is_repairable = cause.kind in ("fault", "peer") and not self.signals.stop_file.exists()
        return Verdict("again" if is_repairable and self.restarts_left > 0 else "failed", cause)


def obey(hub: HostState, hub_name: str, attempt: int, own: Failure | None) -> Verdict | None:
    """Return how the attempt ends by what the first host says; None while it says nothing final.

    `own` is the failure of this host's workers, if they failed.
    """
    match hub.phase:
        case "lost":
            return Verdict("failed", choose_cause(filter(None, [own, describe_loss(hub_name)])))
        case "failed":
            return Verdict("failed", hub.failure)
        case "stopped":
            return Verdict("stopped")
        case "running" if hub.attempt > attempt:
            return Verdict("again")
        case "done":
            return Verdict("failed", own) if own else Verdict("done")
    return None


def has_failed(state: HostState, attempt: int) -> bool:
    """Tell whether a host failed in this attempt: one that has yet to hear of it still tells of the last one."""
    return state.phase == "lost" or (state.phase == "failed" and state.attempt == attempt)


def wait_for_all_hosts(
    link: ClusterLink, own_failure: Failure | None, timeout: float, stop_file: Path
) -> Failure | None:
    """Wait until every host is there, for `timeout` seconds at most.

    Returns the failure of one of them, this one included, or of those that never came.
    """
    link.publish(HostState("failed", failure=own_failure) if own_failure else HostState("ready"))
    failure = own_failure
    deadline = time.monotonic() + timeout
    while not stop_file.exists() and (absent := link.find_absent()) and time.monotonic() < deadline:
        if link.is_double:
            break
        time.sleep(POLL_SECONDS)
    if not stop_file.exists() and absent and failure is None:
        failure = describe_absence(link, absent, timeout)
    if link.own == link.hub:
        states = [link.state(name) for name in link.names]
        failure = choose_cause(filter(None, [failure, *(state.failure for state in states)]))
        if failure:
            link.publish(HostState("failed", failure=failure))
    return failure


def wait_for_trainers(link: ClusterLink, stop_file: Path) -> Failure | None:
    """Keep a host that does not train until those that do are at their end. Return their failure, if they failed."""
    link.publish(HostState("done"))
    while True:
        hub = link.state(link.hub)
        if hub.phase == "lost":
            return describe_loss(link.hub)
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
    return Failure(
        f"Host {', '.join(absent)} could not be reached from {link.own} within {timeout:.0f} s{why}: see its log; "
        "and let the hosts reach each other on every port (the job's security groups).",
        "lost",
        time.time(),
    )


def describe_loss(host: str) -> Failure:
    """Return the failure of a job that lost a host."""
    return Failure(
        f"Host {host} no longer answers: its container was killed or its machine failed. Start the job again; "
        "it goes on from the newest checkpoint.",
        "lost",
        time.time(),
    )


def end_processes(child: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all below it, and wait until they are gone, since they hold the GPUs."""
    if child.poll() is None:
        workers = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        child.wait()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):  # it has died with its parent
                worker.kill()
        psutil.wait_procs(workers, timeout=KILL_SECONDS)
