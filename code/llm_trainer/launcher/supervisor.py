# SPDX-License-Identifier: Apache-2.0
"""Run a job's worker processes to their end, in step with the other hosts, and again after a fault if allowed.

The first training host knows how all others are. It decides to go on, to begin another attempt and with whom, or that
the job has failed. The others report and follow. A lost first host is a matter of hosts/failover.py. A stop that
reaches a host before its workers train ends the workers of all hosts at once. After that (job/start_gate.py) they obey
a stop themselves.
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
from llm_trainer.launcher.hosts.meeting import POLL_SECONDS, Quorum, advise_restart, describe_loss

SETTLE_SECONDS = REPORT_SECONDS + 10.0  # the cause of a failure may come after its echo
LEAVE_SECONDS = 120.0  # when all is written, the first host waits no longer than this for the others
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Verdict:
    """The end of an attempt, for all hosts."""

    # stopped: before the training began; leaderless: the first host is lost, and the others may go on
    what: Literal["done", "stopped", "again", "failed", "leaderless"]
    failure: Failure | None = None


@dataclass
class Attempts:
    """The attempts of this host's workers so far, whichever host was the first one."""

    restarts_left: int
    number: int = 0  # of the last one
    members: tuple[str, ...] = ()  # the hosts of it
    cause: Failure | None = None  # why it failed

    def note_failure(self, cause: Failure | None) -> None:
        """Take the failure of the last attempt, after which another one is made."""
        self.restarts_left -= 1
        self.cause = cause

    def note_loss(self, host: str, cause: Failure) -> None:
        """Take the loss of a host that has no more part in the job."""
        self.note_failure(cause)
        self.members = tuple(name for name in self.members if name != host)

    def describe(self) -> str:
        """Return the line for the log when an attempt begins after another."""
        return f"Attempt {self.number}: the workers start again from the newest checkpoint."


@dataclass(frozen=True)
class HostWorkers:
    """The workers of this host, as the supervisor needs them."""

    start: Callable[[Attempts], "subprocess.Popen[bytes]"]  # returns the process that starts the workers
    find_gpu_faults: Callable[[], list[str]]  # sentences about what GPUs of this host reported lately
    trace_prefix: str
    num_processes: int

    def trace(self, members: Sequence[str]) -> RankTraces:
        """Return the traces of an attempt's ranks."""
        return RankTraces(self.trace_prefix, members, self.num_processes * len(members))


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
    """The life of this host's workers, while one host is the first."""

    def __init__(
        self, link: ClusterLink, quorum: Quorum, workers: HostWorkers, signals: AttemptSignals, attempts: Attempts
    ) -> None:
        """Take the hosts that may train, and the attempts made so far."""
        self.link = link
        self.quorum = quorum
        self.workers = workers
        self.signals = signals
        self.attempts = attempts
        self.began = 0.0  # of the attempt, in seconds since the epoch

    @property
    def leads(self) -> bool:
        """True on the first training host."""
        return self.link.own == self.link.hub

    def run(self) -> Verdict:
        """Run attempt after attempt, until the job is done, stopped, has failed for good, or lost its first host."""
        while True:
            verdict = (self.call_hosts if self.leads else self.await_call)() or self.run_attempt()
            if verdict.what == "again":
                self.attempts.note_failure(verdict.failure)
                continue
            if verdict.what != "leaderless":
                self.link.publish(HostState(verdict.what, self.attempts.number, verdict.failure))
            return verdict

    def run_attempt(self) -> Verdict:
        """Run the workers of the attempt that was called."""
        attempts = self.attempts
        self.signals.reset()
        self.began = time.time()
        self.link.publish(HostState("running", attempts.number, members=attempts.members))
        if attempts.number > 1:
            log.info(*([attempts.cause.reason] if attempts.cause else []), attempts.describe())
        self.workers.trace(attempts.members).make_folder()
        child = self.workers.start(attempts)
        try:
            return (self.lead if self.leads else self.follow)(child, attempts.number)
        finally:
            end_processes(child)

    def call_hosts(self) -> Verdict | None:
        """Choose the hosts of the next attempt, after waiting for those of the last one, or for others in their place.

        Returns how the job ends where too few are there.
        """
        there = self.gather_hosts() if self.quorum.goes_on_without else self.quorum.trainers
        if there is None:
            return Verdict("failed", self.attempts.cause)
        members = self.quorum.choose(there)
        if not members:
            return Verdict("failed", self.describe_shortage(there))
        earlier = max(self.link.state(name).attempt for name in members)  # under another first host perhaps
        self.attempts.number, self.attempts.members = 1 + max(self.attempts.number, earlier), members
        if without := [name for name in self.quorum.trainers if name not in members]:
            log.info(f"{len(members)} of {len(self.quorum.trainers)} hosts train, without {', '.join(without)}.")
        return None

    def gather_hosts(self) -> Sequence[str] | None:
        """Wait for the hosts of the last attempt. Return all that are there in the end, None after a stop signal."""
        attempts, began = self.attempts, time.monotonic()
        since = began if attempts.members else 0.0  # at the start of the job they have just met
        is_told = False
        while True:
            there = self.quorum.find_present(self.link, attempts.number, since)
            missing = [name for name in attempts.members if name not in there]
            if not missing or time.monotonic() - began > self.quorum.timeout:
                return there
            if self.signals.stop_file.exists() or any(state.is_stopping for state in self.read_states().values()):
                return None
            if not is_told and any(not self.link.answers(name) for name in missing):
                is_told = True
                text = f"Waiting {self.quorum.timeout:.0f} s at most for another host in the place of a lost one."
                log.info(f"{attempts.cause.reason} {text}" if attempts.cause else text)
            time.sleep(POLL_SECONDS)

    def await_call(self) -> Verdict | None:
        """Wait until the first host calls this one to an attempt. Returns how the job ends where it does not."""
        is_spare = False
        while True:
            hub = self.link.state(self.link.hub)
            if hub.phase == "running" and hub.attempt > self.attempts.number:
                if self.link.own in hub.members:
                    self.attempts.number, self.attempts.members = hub.attempt, hub.members
                    return None
                if not is_spare:
                    log.info(f"The others train without this host, {self.link.own}: it waits for the next attempt.")
                is_spare = True
            elif verdict := self.obey(hub, None):
                return verdict
            if self.signals.stop_file.exists() and is_spare:
                return Verdict("stopped")
            self.tell_stop()
            time.sleep(POLL_SECONDS)

    def lead(self, child: "subprocess.Popen[bytes]", attempt: int) -> Verdict:
        """Watch all hosts from the first one, and decide how the attempt ends."""
        done_at = None
        while True:
            states = self.read_states()
            self.join_stop(states)
            if self.signals.stops_early() or any(state.phase == "stopped" for state in states.values()):
                return Verdict("stopped")
            exit_code = child.poll()
            if exit_code == 0:  # all is written, whatever becomes of a host now
                states = {name: state for name, state in states.items() if state.phase != "lost"}
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
            if verdict := self.obey(hub, own):
                return verdict
            time.sleep(POLL_SECONDS)

    def obey(self, hub: HostState, own: Failure | None) -> Verdict | None:
        """Return how the attempt ends by what the first host says; None while it says nothing final.

        `own` is the failure of this host's workers, if they failed.
        """
        match hub.phase:
            case "lost" if self.quorum.goes_on_without:
                return Verdict("leaderless")
            case "lost":
                cause = choose_cause(filter(None, [own, advise_restart(describe_loss(self.link.hub))]))
                return Verdict("failed", cause)
            case "failed":
                return Verdict("failed", hub.failure)
            case "stopped":
                return Verdict("stopped")
            case "running" if hub.attempt > self.attempts.number:
                return Verdict("again")
            case "done":
                return Verdict("failed", own) if own else Verdict("done")
        return None

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
        """Return how the other hosts of the attempt are."""
        attempts = self.attempts
        return {name: self.link.state(name, attempts.number) for name in attempts.members if name != self.link.own}

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
                traces = self.workers.trace(self.attempts.members)
                return traces.blame_missing_ranks(cause, [*waits, *self.read_waits()])
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
        return [*told, *self.workers.trace(self.attempts.members).read_waits(self.began)]

    def judge(self, cause: Failure) -> Verdict:
        """Decide whether another attempt makes sense.

        A mistake would be made again, and who asked for a stop wants no restart. A lost host may not come back.
        """
        kinds = ("fault", "peer", "lost") if self.quorum.goes_on_without else ("fault", "peer")
        is_repairable = cause.kind in kinds and not self.signals.stop_file.exists()
        if is_repairable and self.attempts.restarts_left > 0:
            return Verdict("again", cause)
        return Verdict("failed", advise_restart(cause) if cause.kind == "lost" else cause)

    def describe_shortage(self, there: Sequence[str]) -> Failure:
        """Return the failure of a job with too few hosts left."""
        gone = ", ".join(name for name in self.quorum.trainers if name not in there)
        cause = self.attempts.cause or describe_loss(gone)
        text = (
            f"{cause.reason} No other came in its place within {self.quorum.timeout:.0f} s, and the job needs "
            f"{min(self.quorum.counts)} hosts."
        )
        return advise_restart(replace(cause, reason=text))


def has_failed(state: HostState, attempt: int) -> bool:
    """Tell whether a host failed in this attempt: one that has yet to hear of it still tells of the last one."""
    return state.phase == "lost" or (state.phase == "failed" and state.attempt == attempt)


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
