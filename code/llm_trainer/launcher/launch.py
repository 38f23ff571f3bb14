# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the container: checks the job, starts torchrun on this host, and turns its end into SageMaker's answer.

Never imports torch: a mistake is reported within a second, before any process holds a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llm_trainer.common.errors import Failure, UserError, write_failure
from llm_trainer.config.environment import Environment, find_base_dir, read_environment, read_json_object
from llm_trainer.config.schema import redact, show
from llm_trainer.config.secret_references import secret_variables
from llm_trainer.host.machine import inspect_machine
from llm_trainer.host.system_metrics import SystemMetrics
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.disk_budget import inspect_disk_need
from llm_trainer.job.inputs import find_warnings
from llm_trainer.job.job import Job, check_job
from llm_trainer.job.start_gate import StartGate
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.cluster import ClusterLink, HostState
from llm_trainer.launcher.job_events import JobEventWriter
from llm_trainer.launcher.reporter_process import ReporterProcess
from llm_trainer.launcher.stop_signal import StopSignal
from llm_trainer.launcher.supervisor import (
    INTRODUCTION_SECONDS,
    Supervisor,
    Verdict,
    wait_for_all_hosts,
    wait_for_trainers,
)
from llm_trainer.launcher.user_script import names_a_script, run_script
from llm_trainer.launcher.worker_processes import (
    build_cache_variables,
    build_library_variables,
    build_worker_command,
    build_worker_variables,
    count_worker_processes,
)


def launch(arguments: Sequence[str]) -> int:
    """Run the job that the input tree and the command line describe; the container's exit code, 0 or 1."""
    started = time.time()
    output_dir = find_base_dir() / "output"
    try:
        (output_dir / "failure").unlink(missing_ok=True)  # of an earlier job in the same tree
        hyperparameters = read_json_object(find_base_dir() / "input" / "config" / "hyperparameters.json")
        if names_a_script(hyperparameters):
            os.environ.update(secret_variables(None, os.environ))
            return run_script(find_base_dir(), hyperparameters, {**build_cache_variables(os.environ), **os.environ})
        failure = run(read_environment(), arguments, started)
    except UserError as error:
        failure = Failure(str(error), "mistake", started)
    except PermissionError as error:
        fix = f"mount {output_dir.parent} so that user {os.getuid()} may read and write it."
        failure = Failure(f"{error}: {fix}", "mistake", started)
    except OSError as error:
        failure = Failure(f"The job could not be started: {error}.", "mistake", started)
    if failure is None:
        return 0
    print(failure.reason, file=sys.stderr, flush=True)
    write_failure(output_dir, failure.reason)
    return 1


def run(environment: Environment, arguments: Sequence[str], started: float) -> Failure | None:
    """This host's part in the job, from the check of the job to the end of all hosts; why it failed, if it did."""
    with (
        tempfile.TemporaryDirectory(prefix="llm-trainer-") as folder,
        StopSignal(Path(folder) / "stop") as stop,
        ClusterLink([*environment.hosts, *environment.other_hosts], environment.current_host) as hosts,
    ):
        if not environment.trains:
            print(f"This host, {environment.current_host}, does not train: it waits for {hosts.hub}.", flush=True)
            return wait_for_trainers(hosts, stop.file)
        mistake, timeout = None, INTRODUCTION_SECONDS
        timeline = Timeline(started)
        try:
            job = check_job(environment, arguments)
            os.environ.update(secret_variables(job.settings, os.environ))
            check_machine(job)
            if environment.node_rank == 0 and job.settings.output.push_to_hub:
                from llm_trainer.export.publish import prepare_push  # the Hub's client takes half a second to import

                prepare_push(job.settings)
            timeout = job.settings.parallelism.host_timeout_seconds
        except UserError as error:
            mistake = Failure(str(error), "mistake", started)
        timeline.mark("check")
        failure = wait_for_all_hosts(hosts, mistake, timeout, stop.file)
        timeline.mark("meeting")
        if failure:
            return failure
        if stop.file.exists():
            hosts.publish(HostState("stopped"))
            describe_early_stop(job)
            return None
        describe_job(job)
        verdict = supervise(job, arguments, hosts, Path(folder), stop.file, timeline)
        if verdict.what == "stopped":
            describe_early_stop(job)
        stop.describe_end()
        return verdict.failure


def supervise(
    job: Job, arguments: Sequence[str], hosts: ClusterLink, scratch_dir: Path, stop_file: Path, timeline: Timeline
) -> Verdict:
    """Run the workers, and what starts them, to the end of the job on all hosts."""
    environment, started = job.environment, timeline.started
    failures_dir = scratch_dir / "failures"
    failures_dir.mkdir()
    command, variables = build_worker_command(job, arguments), build_worker_variables(job, scratch_dir, started)

    chronicle = JobEventWriter(environment, hosts)
    chronicle.begin(job.settings, job.inputs, timeline)
    folders = {"checkpoints": job.inputs.checkpoint_dir, "temp": Path(tempfile.gettempdir())}

    def start(attempt: int, earlier: Failure | None) -> "subprocess.Popen[bytes]":
        if earlier:
            timeline.mark(f"attempt_{attempt - 1}")
            chronicle.begin_again(job.settings, attempt, earlier)
        if environment.node_rank == 0:  # who writes them; the folder may be one for all hosts
            checkpoint_dir.remove_partial_checkpoints(job.inputs.checkpoint_dir)
        # A session of its own: a terminal's Ctrl-C is for the launcher alone, which then stops the job in order.
        phases = {"LLM_TRAINER_PHASES": json.dumps(timeline.seconds)}
        return subprocess.Popen(command, env=variables | phases, start_new_session=True)

    with ReporterProcess(environment, job.settings, job.inputs, variables, stop_file):
        with SystemMetrics(environment.current_host, folders, chronicle.write, started) as metrics:
            verdict = Supervisor(
                hosts,
                environment.hosts,
                start,
                metrics.find_recent_faults,
                failures_dir,
                stop_file,
                StartGate(scratch_dir),
                job.settings.parallelism.max_restarts,
            ).run()
        chronicle.end(verdict, job.inputs)
    return verdict


def describe_job(job: Job) -> None:
    environment = job.environment
    print(
        f"Host {environment.current_host} ({environment.node_rank + 1} of {len(environment.hosts)}): "
        f"{environment.num_gpus} GPUs, {environment.num_cpus} CPU cores, {count_worker_processes(job)} worker processes"
    )
    print(f"Model {job.inputs.model}")
    for split, sources in (("Training", job.inputs.train), ("Validation", job.inputs.validation)):
        for source in sources:
            print(f"{split} data: {source.describe()}")
    for name, value in redact(job.settings).items():
        if job.settings.is_given(name):
            print(f"Setting {name}={show(value)}")
    for oddity in find_warnings(job.settings, environment, job.inputs):
        print(f"Warning: {oddity}")
    sys.stdout.flush()


def describe_early_stop(job: Job) -> None:
    kept = checkpoint_dir.list_checkpoints(job.inputs.checkpoint_dir) if job.settings.training.use_checkpoints else []
    stays = f", and {kept[0].name} stays for the next start" if kept else ""
    print(f"Stopped before the training began: there is nothing to save{stays}.", flush=True)


def check_machine(job: Job) -> None:
    """Say what the host offers, one line each. Raises UserError for what would end the job after it has begun."""
    cache_dir = Path(build_library_variables(job.settings, job.inputs)["LLM_TRAINER_CACHE"])
    findings = [*inspect_machine(job.environment), *inspect_disk_need(job.settings, job.inputs, cache_dir)]
    for finding in findings:
        print(f"Machine: {finding.verdict}: {finding.subject}: {finding.text}")
    sys.stdout.flush()
    errors = [f"{finding.subject}: {finding.text}" for finding in findings if finding.verdict == "error"]
    if errors and not job.settings.parallelism.use_cpu:
        raise UserError(*errors)
