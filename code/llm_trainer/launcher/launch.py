# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the container: checks the job, starts torchrun on this host, and turns its end into SageMaker's answer.

Never imports torch: a mistake is reported within a second, before any process holds a GPU.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from llm_trainer.common.errors import Failure, UserError, write_failure
from llm_trainer.config.checks import count_processes
from llm_trainer.config.environment import Environment, find_base_dir, read_environment, read_json_object
from llm_trainer.config.schema import Settings, redact, show
from llm_trainer.config.secret_references import secret_variables
from llm_trainer.host.machine import inspect_machine
from llm_trainer.host.network import network_variables
from llm_trainer.host.nvidia_driver import driver_variables
from llm_trainer.host.system_metrics import SystemMetrics
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.disk_budget import inspect_need
from llm_trainer.job.inputs import Inputs, find_oddities
from llm_trainer.job.job import Job, check_job
from llm_trainer.job.start_gate import Gate
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.cluster import Hosts, State
from llm_trainer.launcher.job_events import Chronicle
from llm_trainer.launcher.reporter_process import Reporting
from llm_trainer.launcher.supervisor import INTRODUCTION_SECONDS, Supervisor, Verdict, meet, wait_for_trainers
from llm_trainer.launcher.user_script import names_a_script, run_script
from llm_trainer.readers.sources import HubSource

MASTER_PORT = 7777  # what SageMaker's own toolkit uses between hosts
# On a CPU the tensors of every step come from malloc, which by default takes large ones from the kernel, page by page
# filled with zeros, and gives them back after use: a fifth of a step's time (malloc(3), glibc's tunables).
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def launch(arguments: Sequence[str]) -> int:
    """Run the job that the input tree and the command line describe; the container's exit code, 0 or 1."""
    started = time.time()
    output_dir = find_base_dir() / "output"
    try:
        (output_dir / "failure").unlink(missing_ok=True)  # of an earlier job in the same tree
        hyperparameters = read_json_object(find_base_dir() / "input" / "config" / "hyperparameters.json")
        if names_a_script(hyperparameters):
            os.environ.update(secret_variables(None, os.environ))
            return run_script(find_base_dir(), hyperparameters, {**cache_variables(os.environ), **os.environ})
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
        Stop(Path(folder) / "stop") as stop,
        Hosts([*environment.hosts, *environment.other_hosts], environment.current_host) as hosts,
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
        failure = meet(hosts, mistake, timeout, stop.file)
        timeline.mark("meeting")
        if failure:
            return failure
        if stop.file.exists():
            hosts.publish(State("stopped"))
            describe_early_stop(job)
            return None
        describe_job(job)
        verdict = supervise(job, arguments, hosts, Path(folder), stop.file, timeline)
        if verdict.what == "stopped":
            describe_early_stop(job)
        stop.describe_end()
        return verdict.failure


def supervise(
    job: Job, arguments: Sequence[str], hosts: Hosts, scratch_dir: Path, stop_file: Path, timeline: Timeline
) -> Verdict:
    """Run the workers, and what starts them, to the end of the job on all hosts."""
    environment, started = job.environment, timeline.started
    failures_dir = scratch_dir / "failures"
    failures_dir.mkdir()
    command, variables = workers_command(job, arguments), worker_variables(job, scratch_dir, started)

    chronicle = Chronicle(environment, hosts)
    chronicle.begin(job.settings, job.inputs, timeline)
    folders = {"checkpoints": job.inputs.checkpoint_dir, "temp": Path(tempfile.gettempdir())}

    def start(attempt: int, earlier: Failure | None) -> "subprocess.Popen[bytes]":
        if earlier:
            timeline.mark(f"attempt_{attempt - 1}")
            chronicle.begin_again(job.settings, attempt, earlier)
        if environment.node_rank == 0:  # who writes them; the folder may be one for all hosts
            checkpoint_dir.clean(job.inputs.checkpoint_dir)
        # A session of its own: a terminal's Ctrl-C is for the launcher alone, which then stops the job in order.
        phases = {"LLM_TRAINER_PHASES": json.dumps(timeline.seconds)}
        return subprocess.Popen(command, env=variables | phases, start_new_session=True)

    with Reporting(environment, job.settings, job.inputs, variables, stop_file):
        with SystemMetrics(environment.current_host, folders, chronicle.write, started) as metrics:
            verdict = Supervisor(
                hosts,
                environment.hosts,
                start,
                metrics.find_recent_faults,
                failures_dir,
                stop_file,
                Gate(scratch_dir),
                job.settings.parallelism.max_restarts,
            ).run()
        chronicle.end(verdict, job.inputs)
    return verdict


class Stop:
    """SIGTERM and SIGINT to this process, turned into a file that the workers look for after each step.

    As PID 1 this process has no default handlers: without ours a stop would be ignored until SIGKILL. The signal is not
    passed on: torchrun would kill the workers 30 s after it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked_at: float | None = None

    def __enter__(self) -> "Stop":
        self.previous = {signum: signal.signal(signum, self.receive) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.asked_at is None:
            self.asked_at = time.time()
            self.file.touch()
            # Not print: the signal may have come in the middle of one.
            text = f"Received {signal.Signals(signum).name}: after this step, save a checkpoint, export and end.\n"
            os.write(sys.stdout.fileno(), text.encode())

    def describe_end(self) -> None:
        if self.asked_at is not None:
            print(f"All processes ended {time.time() - self.asked_at:.1f} s after the signal.", flush=True)


def describe_job(job: Job) -> None:
    environment = job.environment
    print(
        f"Host {environment.current_host} ({environment.node_rank + 1} of {len(environment.hosts)}): "
        f"{environment.num_gpus} GPUs, {environment.num_cpus} CPU cores, {num_processes(job)} worker processes"
    )
    print(f"Model {job.inputs.model}")
    for split, sources in (("Training", job.inputs.train), ("Validation", job.inputs.validation)):
        for source in sources:
            print(f"{split} data: {source.describe()}")
    for name, value in redact(job.settings).items():
        if job.settings.is_given(name):
            print(f"Setting {name}={show(value)}")
    for oddity in find_oddities(job.settings, environment, job.inputs):
        print(f"Warning: {oddity}")
    sys.stdout.flush()


def describe_early_stop(job: Job) -> None:
    kept = checkpoint_dir.list_checkpoints(job.inputs.checkpoint_dir) if job.settings.training.use_checkpoints else []
    stays = f", and {kept[0].name} stays for the next start" if kept else ""
    print(f"Stopped before the training began: there is nothing to save{stays}.", flush=True)


def check_machine(job: Job) -> None:
    """Say what the host offers, one line each. Raises UserError for what would end the job after it has begun."""
    cache_dir = Path(library_variables(job.settings, job.inputs)["LLM_TRAINER_CACHE"])
    findings = [*inspect_machine(job.environment), *inspect_need(job.settings, job.inputs, cache_dir)]
    for finding in findings:
        print(f"Machine: {finding.verdict}: {finding.subject}: {finding.text}")
    sys.stdout.flush()
    errors = [f"{finding.subject}: {finding.text}" for finding in findings if finding.verdict == "error"]
    if errors and not job.settings.parallelism.use_cpu:
        raise UserError(*errors)


def num_processes(job: Job) -> int:
    return count_processes(job.settings, job.environment)


def workers_command(job: Job, arguments: Sequence[str]) -> list[str]:
    environment = job.environment
    if num_processes(job) == len(environment.hosts) == 1:
        return [sys.executable, "-m", "llm_trainer.launcher.single_worker", *arguments]
    command = [sys.executable, "-m", "llm_trainer.launcher.torchrun", f"--nproc-per-node={num_processes(job)}"]
    if len(environment.hosts) > 1:
        command += [
            f"--nnodes={len(environment.hosts)}",
            f"--node-rank={environment.node_rank}",
            f"--master-addr={environment.hosts[0]}",
            f"--master-port={MASTER_PORT}",
        ]
    # Told its own name, torchrun does not look it up, which takes minutes where nobody answers.
    command += [f"--local-addr={environment.current_host if len(environment.hosts) > 1 else '127.0.0.1'}"]
    return [*command, "--module", "llm_trainer.worker", *arguments]


def worker_variables(job: Job, scratch_dir: Path, started: float) -> dict[str, str]:
    """The workers' environment variables: threads that share the cores, the network, and the libraries' own."""
    variables = {
        "PYTHONUNBUFFERED": "1",
        "LLM_TRAINER_SCRATCH": str(scratch_dir),
        "LLM_TRAINER_STARTED": str(started),
        # torchrun would set 1, which halves the speed of a single CPU rank
        "OMP_NUM_THREADS": str(max(1, job.environment.num_cpus // num_processes(job))),
        **network_variables(job.environment),
    }
    if job.settings.parallelism.use_cpu or not job.environment.num_gpus:
        variables |= KEPT_MEMORY
    if len(job.environment.hosts) > 1:
        variables["LLM_TRAINER_HOST"] = job.environment.current_host
    variables |= library_variables(job.settings, job.inputs)
    return variables | driver_variables(variables)


def library_variables(settings: Settings, inputs: Inputs) -> dict[str, str]:
    """This process's variables, and what libraries of models and data are told: caches off the small root disk, no
    needless talk."""
    variables = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # carriage returns spoil CloudWatch's lines
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        **cache_variables(os.environ),
        **os.environ,  # what the user sets in the job's Environment wins
    }
    if not needs_hub(settings, inputs):
        variables["HF_HUB_OFFLINE"] = "1"  # nothing to fetch: look-ups would only wait for a network
    return variables


def needs_hub(settings: Settings, inputs: Inputs) -> bool:
    """Whether the model, its chat template or data come from the Hugging Face Hub, or the result goes there."""
    places = (inputs.model, settings.model.chat_template_path)
    has_hub_data = any(isinstance(source, HubSource) for source in (*inputs.train, *inputs.validation))
    return settings.output.push_to_hub or has_hub_data or any(place and not Path(place).exists() for place in places)


def cache_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Where libraries keep what they download and compile: the warm pool's folder if there is one, else /tmp."""
    root = Path(variables.get("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", tempfile.gettempdir()))
    return {
        "HF_HOME": str(root / "huggingface"),
        "LLM_TRAINER_CACHE": str(root / f"llm-trainer-{os.getuid()}"),  # of one user: another may not write there
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
    }
