# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the container: check the job, start its workers on this host, and turn their end into SageMaker's answer.

It stays free of torch: a mistake is reported within a second, before any process holds a GPU.
"""

import contextlib
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_trainer.common import log
from llm_trainer.common.errors import Failure, UserError, write_failure
from llm_trainer.common.files import hide_in_file, read_json_object
from llm_trainer.common.processes import bind_command
from llm_trainer.config.checks import count_processes, count_usable_hosts
from llm_trainer.config.environment import MEMBERS, Environment, find_base_dir, read_environment
from llm_trainer.config.placement import put_away, take_out
from llm_trainer.config.schema import describe_settings, show_value
from llm_trainer.config.secret_references import USED_FOR, Use, read_secret_variables, withhold_secrets
from llm_trainer.config.tracker_choice import build_tracker_variables, choose_trackers
from llm_trainer.host.findings import log_findings
from llm_trainer.host.machine import inspect_machine
from llm_trainer.host.network import open_port
from llm_trainer.host.system_metrics import SystemMetrics
from llm_trainer.host.write_probe import find_temp_problem
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.checkpoint_lock import lock_checkpoints
from llm_trainer.job.disk_budget import WriteSettings, inspect_disk_need
from llm_trainer.job.inputs import find_warnings
from llm_trainer.job.job import Job, check_job
from llm_trainer.job.rank_traces import find_trace_prefix
from llm_trainer.job.start_gate import StartGate
from llm_trainer.journal.journal import FILE_NAME
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.hosts.agreement import list_facts
from llm_trainer.launcher.hosts.cluster import ClusterLink, HostState
from llm_trainer.launcher.hosts.failover import find_successor, wait_for_hub
from llm_trainer.launcher.hosts.greeting import derive_key
from llm_trainer.launcher.hosts.meeting import (
    Quorum,
    advise_restart,
    describe_loss,
    wait_for_all_hosts,
    wait_for_trainers,
)
from llm_trainer.launcher.job_events import JobDescription, JobEventWriter
from llm_trainer.launcher.last_words import explain_crash
from llm_trainer.launcher.reporter_process import ReporterOptions, ReporterProcess
from llm_trainer.launcher.stand_by import run_once_a_node
from llm_trainer.launcher.stop_signal import StopSignal, withhold_stops
from llm_trainer.launcher.supervisor import Attempts, AttemptSignals, HostWorkers, Supervisor, Verdict
from llm_trainer.launcher.user_script import names_a_script, run_script
from llm_trainer.launcher.worker_processes import (
    MASTER_PORT,
    WorkerProcesses,
    build_cache_variables,
    build_library_variables,
    reads_from_hub,
)

INTRODUCTION_SECONDS = 20.0  # containers of a job start within this of each other, when all is well


def launch(arguments: Sequence[str]) -> int:
    """Run the job that the input tree and the command line describe. Return the container's exit code, 0 or 1.

    Of several processes that a launcher has started on this node, the first runs it and the others stand by.
    """
    put_away(os.environ)
    started = time.time()
    try:
        return run_once_a_node(arguments, lambda place: lead_node(arguments, place.node_rank == 0, started))
    except UserError as error:
        return fail(Failure(str(error), "mistake", started))


def lead_node(arguments: Sequence[str], is_first: bool, started: float) -> int:
    """Run the job on this node, the first or another one. Return the exit code."""
    try:
        if is_first:  # the folder may be one for all nodes
            (find_base_dir() / "output" / "failure").unlink(missing_ok=True)  # left by an earlier job in the same tree
        hyperparameters = read_json_object(find_base_dir() / "input" / "config" / "hyperparameters.json")
        if names_a_script(hyperparameters):
            take_out(os.environ)
            os.environ.update(read_secret_variables({}, os.environ))
            return run_script(find_base_dir(), hyperparameters, {**build_cache_variables(os.environ), **os.environ})
        if problem := find_temp_problem():
            raise UserError(problem)
        failure = run_host(read_environment(), arguments, Timeline(started))
    except UserError as error:
        failure = Failure(str(error), "mistake", started)
    return fail(failure) if failure else 0


def fail(failure: Failure) -> int:
    """Tell why the job failed, in the log and in output/failure. Return the exit code."""
    log.error(failure.reason)
    write_failure(find_base_dir() / "output", failure.reason)
    return 1


def run_host(environment: Environment, arguments: Sequence[str], timeline: Timeline) -> Failure | None:
    """Do this host's part in the job, from the check to the end of all hosts. Return why it failed, if it did."""
    names = [*environment.hosts, *environment.other_hosts]
    with (
        tempfile.TemporaryDirectory(prefix="llm-trainer-") as folder,
        StopSignal(Path(folder) / "stop") as stop,
        ClusterLink(names, environment.current_host, derive_key(names, os.environ), environment.first_address) as link,
    ):
        try:
            return take_part(environment, arguments, timeline, link, stop)
        except Exception as error:  # the other hosts wait for this one, whatever befell it
            failure = explain_crash(error, "launcher")
            link.publish(HostState("failed", link.state(link.own).attempt, failure))
            return failure


def take_part(
    environment: Environment, arguments: Sequence[str], timeline: Timeline, link: ClusterLink, stop: StopSignal
) -> Failure | None:
    """Do this host's part in the job in touch with the other hosts. Return why the job failed, if it did."""
    log.info(environment.placement.describe())
    if environment.placement.warning:
        log.warning(environment.placement.warning)
    if not environment.trains:
        log.info(f"This host, {environment.current_host}, does not train: it waits for {link.hub}.")
        return wait_for_trainers(link, stop.file)
    job, failure = prepare_host(environment, arguments, link, stop.file, timeline)
    if job is None or failure is not None:
        return failure
    if stop.file.exists():
        link.publish(HostState("stopped"))
        log_early_stop(job)
        return None
    log_job(job)
    attempts = Attempts(job.settings.parallelism.max_restarts)
    verdict = HostJob(job, link, build_quorum(job), stop.file, timeline).run(arguments, attempts)
    if verdict.what == "stopped":
        log_early_stop(job)
    stop.log_end()
    return verdict.failure


def prepare_host(
    environment: Environment, arguments: Sequence[str], link: ClusterLink, stop_file: Path, timeline: Timeline
) -> tuple[Job | None, Failure | None]:
    """Check the job on this host, and wait until all hosts have done so.

    Returns the job, None where it has a mistake, and the failure of this or another host.
    """
    job, failed = None, None
    try:
        job = check_job(environment, arguments)
        check_host(job)
        link.facts = list_facts(describe_settings(job.settings), count_processes(job.settings.parallelism, environment))
    except UserError as error:
        failed = Failure(str(error), "mistake", timeline.started)
    except Exception as error:  # told to the other hosts like a mistake: they wait for this one
        failed = explain_crash(error, "launcher")
    timeline.mark("check")
    is_checked = job is not None and failed is None
    quorum = build_quorum(job) if job and is_checked else Quorum(environment.hosts, [], INTRODUCTION_SECONDS)
    failure = wait_for_all_hosts(link, failed, quorum, stop_file)
    if failure and failure.kind == "lost":
        failure = replace(failure, reason=failure.reason + environment.placement.advise())
    timeline.mark("meeting")
    return job, failure


def build_quorum(job: Job) -> Quorum:
    """Return the hosts with which the job may train."""
    settings, environment = job.settings.parallelism, job.environment
    counts = count_usable_hosts(job.settings, environment)
    return Quorum(environment.hosts, counts, settings.host_timeout_seconds, settings.min_hosts is not None)


def check_host(job: Job) -> None:
    """Read the job's secrets, and check what this host offers. Raises UserError with every mistake there is."""
    os.environ.update(read_secret_variables(job.settings.secrets, os.environ))
    check_machine(job)
    if job.environment.node_rank == 0:
        check_first_host(job)


def check_first_host(job: Job) -> None:
    """Take what only the first host uses: a port, the checkpoint folder, the Hub. Raises UserError where it cannot."""
    if len(job.environment.hosts) > 1:
        open_port(MASTER_PORT).close()  # torchrun would tell of one in use by a traceback
    if job.settings.training.use_checkpoints:
        lock_checkpoints(job.inputs.checkpoint_dir, job.environment.current_host)
    if job.settings.output.push_to_hub:
        from llm_trainer.export.publish import prepare_push  # the Hub's client takes half a second to import

        prepare_push(job.settings.output)


def check_machine(job: Job) -> None:
    """Log what the host offers, one line each. Raises UserError for what would end the job after it has begun."""
    cache_dir = Path(find_library_variables(job)["LLM_TRAINER_CACHE"])
    sections = WriteSettings(job.settings.adapter, job.settings.training, job.settings.output)
    machine = inspect_machine(job.environment, job.settings.parallelism.require_efa)
    findings = [*machine, *inspect_disk_need(sections, job.inputs, cache_dir)]
    log_findings(findings)
    errors = [f"{finding.subject}: {finding.text}" for finding in findings if finding.verdict == "error"]
    if errors and not job.settings.parallelism.use_cpu:
        raise UserError(*errors)


def find_library_variables(job: Job) -> dict[str, str]:
    """Return the environment variables that the job's libraries read."""
    return build_library_variables(job.inputs, job.settings.model.chat_template_path, job.settings.output.push_to_hub)


def find_worker_uses(job: Job) -> list[Use]:
    """List what the workers need secrets for."""
    output = job.settings.output
    reads = reads_from_hub(job.inputs, job.settings.model.chat_template_path)
    asked: dict[Use, bool] = {
        "hub": reads or output.push_to_hub,
        "push": output.push_to_hub,
        "mlflow": output.mlflow_register_model is not None,
    }
    return [use for use, is_asked in asked.items() if is_asked]


@dataclass(frozen=True)
class HostJob:
    """A checked job on one host, in touch with the other hosts, while one of them is the first."""

    job: Job
    link: ClusterLink
    quorum: Quorum
    stop_file: Path
    timeline: Timeline

    @property
    def scratch_dir(self) -> Path:
        """The folder that the launcher and the workers of this host share."""
        return self.stop_file.parent

    def run(self, arguments: Sequence[str], attempts: Attempts) -> Verdict:
        """Run this host's part to the end of the job on all hosts, under another first host where that one is lost."""
        verdict = self.supervise(arguments, attempts)
        if verdict.what != "leaderless":
            return verdict
        if wait_for_hub(self.link, attempts.number, self.quorum.timeout, self.stop_file):
            return self.run(arguments, attempts)
        cause = describe_loss(self.link.hub)
        successor = find_successor(self.link, self.quorum)
        if successor is None or self.stop_file.exists() or attempts.restarts_left < 1:
            return Verdict("failed", advise_restart(cause))
        attempts.note_loss(self.link.hub, cause)
        self.link.close()
        with successor.open_link(self.link) as link:
            job = replace(self.job, environment=successor.place(self.job.environment))
            host_job = replace(self, job=job, link=link, quorum=successor.quorum)
            failure = host_job.meet(attempts.number)
            return Verdict("failed", failure) if failure else host_job.run(arguments, attempts)

    def meet(self, attempt: int) -> Failure | None:
        """Meet the others under a new first host, after this attempt. Return the failure of this or another one."""
        failed = None
        if self.link.own == self.link.hub:
            log.info(f"Host {self.link.own} takes the place of the first one.")
            try:
                check_first_host(self.job)
            except UserError as error:
                failed = Failure(str(error), "mistake", time.time())
        return wait_for_all_hosts(self.link, failed, self.quorum, self.stop_file, attempt)

    def supervise(self, arguments: Sequence[str], attempts: Attempts) -> Verdict:
        """Run the workers, and what starts them, to the end of the job on all hosts or the loss of the first one."""
        environment, inputs, started = self.job.environment, self.job.inputs, self.timeline.started
        signals = AttemptSignals(self.scratch_dir / "failures", self.stop_file, StartGate(self.scratch_dir))
        signals.failures_dir.mkdir(exist_ok=True)
        num_processes = count_processes(self.job.settings.parallelism, environment)
        description = JobDescription(started, num_processes, describe_settings(self.job.settings))
        events = JobEventWriter(environment, self.link, description)
        build_variables = functools.cache(self.build_variables)  # most attempts have all hosts
        variables = build_variables(environment.hosts)

        def start(attempts: Attempts) -> "subprocess.Popen[bytes]":
            if attempts.cause:
                self.timeline.mark(f"attempt_{attempts.number - 1}")
            events.write_attempt(attempts, self.timeline, goes_on=bool(list_kept_checkpoints(self.job)))
            return self.start_workers(arguments, attempts.members, build_variables(attempts.members))

        folders = {"checkpoints": inputs.checkpoint_dir, "temp": Path(tempfile.gettempdir())}
        with self.run_reporter(variables):
            with SystemMetrics(environment.current_host, folders, events.write, started) as metrics:
                workers = HostWorkers(start, metrics.find_recent_faults, find_trace_prefix(variables), num_processes)
                verdict = Supervisor(self.link, self.quorum, workers, signals, attempts).run()
            events.write_end(verdict, inputs.model_dir)
        hide_in_records(environment.output_dir / "data")
        return verdict

    def choose_workers(self, members: tuple[str, ...]) -> WorkerProcesses:
        """Return the workers of this host in an attempt of these hosts."""
        settings, own = self.job.settings.parallelism, self.job.environment
        rest = [name for name in (*own.hosts, *own.other_hosts) if name not in members]
        environment = replace(own, hosts=members, other_hosts=tuple(rest))
        on_gpu = own.num_gpus > 0 and not settings.use_cpu
        return WorkerProcesses(environment, count_processes(settings, own), on_gpu, settings.host_timeout_seconds)

    def build_variables(self, members: tuple[str, ...]) -> dict[str, str]:
        """Return the environment of this host's workers in an attempt of these hosts."""
        libraries = find_library_variables(self.job)
        return self.choose_workers(members).build_variables(self.scratch_dir, self.timeline.started, libraries)

    def start_workers(
        self, arguments: Sequence[str], members: tuple[str, ...], variables: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Start an attempt, in a session of its own: a terminal's Ctrl-C is for the launcher, which stops in order."""
        if self.job.environment.node_rank == 0:  # the host that writes them; the folder may be one for all hosts
            checkpoint_dir.remove_partial_checkpoints(self.job.inputs.checkpoint_dir)
        # Not in the command, which every process of the machine may read: a setting can hold a secret.
        own = withhold_secrets(variables, find_worker_uses(self.job)) | {
            "LLM_TRAINER_ARGUMENTS": json.dumps(arguments),
            "LLM_TRAINER_PHASES": json.dumps(self.timeline.seconds),
            MEMBERS: json.dumps(members),
        }
        with withhold_stops():
            return subprocess.Popen(
                bind_command(self.choose_workers(members).build_command()), env=own, start_new_session=True
            )

    def run_reporter(self, variables: Mapping[str, str]) -> contextlib.AbstractContextManager[object]:
        """Return the reporter's process as a context, on the first training host; on the others an empty one."""
        environment, settings, inputs = self.job.environment, self.job.settings, self.job.inputs
        if environment.node_rank > 0:
            return contextlib.nullcontext()
        trackers = choose_trackers(settings.tracking, variables)
        options = ReporterOptions(
            journal=environment.output_dir / "data" / FILE_NAME,
            model_dir=inputs.model_dir,
            checkpoint_dir=inputs.checkpoint_dir if settings.training.use_checkpoints else None,
            trackers=trackers,
            tracks_model=settings.tracking.track_model,
        )
        own = withhold_secrets(variables, [use for use in USED_FOR if use in trackers])
        return ReporterProcess(options, own | build_tracker_variables(settings.tracking, variables), self.stop_file)


def hide_in_records(folder: Path) -> None:
    """Hide secrets in what the workers wrote of other people's words: they do not know those that they do not need."""
    for file in (*folder.glob("failures/*.txt"), *folder.glob("rejected_rows.jsonl")):
        try:
            hide_in_file(file)
        except OSError as error:
            log.warning(f"{file} may hold secrets, and could not be written again ({error}): look before you share it.")


def log_job(job: Job) -> None:
    """Log the host, what the job reads, and the settings that the user gave."""
    environment, settings, inputs = job.environment, job.settings, job.inputs
    num_processes = count_processes(settings.parallelism, environment)
    log.info(
        f"Host {environment.current_host} ({environment.node_rank + 1} of {len(environment.hosts)}): "
        f"{environment.num_gpus} GPUs, {environment.num_cpus} CPU cores, {num_processes} worker processes",
        f"Model {inputs.model}",
        *([f"Adapter to go on from: {inputs.adapter}"] if inputs.adapter else []),
        *([f"Teacher {inputs.teacher}"] if inputs.teacher else []),
        *(f"Training data: {source.describe()}" for source in inputs.train),
        *(f"Validation data: {source.describe()}" for source in inputs.validation),
        *(
            f"Setting {name}={show_value(value)}"
            for name, value in describe_settings(settings).items()
            if settings.is_given(name)
        ),
    )
    for text in find_warnings(settings, environment, inputs):
        log.warning(text)


def list_kept_checkpoints(job: Job) -> list[Path]:
    """List the checkpoints that the job may go on from, the newest first."""
    return checkpoint_dir.list_checkpoints(job.inputs.checkpoint_dir) if job.settings.training.use_checkpoints else []


def log_early_stop(job: Job) -> None:
    """Log that a stop came before the training, and which checkpoint stays for the next start."""
    kept = list_kept_checkpoints(job)
    stays = f", and {kept[0].name} stays for the next start" if kept else ""
    log.info(f"Stopped before the training began: there is nothing to save{stays}.")
