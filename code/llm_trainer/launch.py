# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the container: checks the job, starts torchrun on this host, and turns its end into SageMaker's answer.

Never imports torch: a mistake is reported within a second, before any process holds a GPU.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from llm_trainer.environment import Environment, find_base_dir, read_environment, read_json_object
from llm_trainer.errors import UserError, write_failure
from llm_trainer.own_script import names_a_script, run_script
from llm_trainer.preflight import Inputs, find_inputs
from llm_trainer.settings import SECRETS, Settings, is_given, read_settings, redact, show

MASTER_PORT = 7777  # what SageMaker's own toolkit uses between hosts


@dataclass(frozen=True)
class Job:
    """A checked job: nothing about it is known to be wrong."""

    environment: Environment
    settings: Settings
    inputs: Inputs


def launch(arguments: Sequence[str]) -> int:
    """Run the job that the input tree and the command line describe; the container's exit code, 0 or 1."""
    started = time.time()
    output_dir = find_base_dir() / "output"
    try:
        (output_dir / "failure").unlink(missing_ok=True)  # of an earlier job in the same tree
        hyperparameters = read_json_object(find_base_dir() / "input" / "config" / "hyperparameters.json")
        if names_a_script(hyperparameters):
            return run_script(find_base_dir(), hyperparameters, {**cache_variables(os.environ), **os.environ})
        job = read_job(arguments)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        write_failure(output_dir, str(error))
        return 1
    except PermissionError as error:
        reason = f"{error}: mount {output_dir.parent} so that user {os.getuid()} may read and write it."
        print(reason, file=sys.stderr, flush=True)
        write_failure(output_dir, reason)
        return 1
    describe_job(job)
    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        variables = worker_variables(job, Path(scratch_dir), started)
        exit_code = run_to_end(torchrun_command(job, arguments), variables)
    if exit_code != 0:
        write_failure(output_dir, f"The worker processes ended with exit code {exit_code}: the log above says why.")
        return 1
    return 0


def read_job(arguments: Sequence[str]) -> Job:
    """The job, checked. Raises UserError with every mistake there is."""
    environment = read_environment()
    settings, problems = read_settings(environment, parse_arguments(arguments))
    inputs, missing = find_inputs(settings, environment)
    if problems or missing:
        raise UserError(*problems, *missing)
    return Job(environment, settings, inputs)


def parse_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` -> {key: value}; a lone `--key` means true."""
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"Argument {word!r} is not of the form --key value: write --key before each value.")
        key, separator, value = word[2:].partition("=")
        if not separator:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        values[key.replace("-", "_")] = value
    return values


def describe_job(job: Job) -> None:
    environment = job.environment
    print(
        f"Host {environment.current_host} ({environment.node_rank + 1} of {len(environment.hosts)}): "
        f"{environment.num_gpus} GPUs, {environment.num_cpus} CPU cores, {num_processes(job)} worker processes"
    )
    print(f"Model {job.inputs.model}; training files: {', '.join(map(str, job.inputs.train_files))}")
    for name, value in redact(job.settings).items():
        if is_given(job.settings, name):
            print(f"Setting {name}={show(value)}")
            if name in SECRETS:
                print(f"Warning: everyone who may describe the job can read {name}: give it in the job's Environment.")
    sys.stdout.flush()


def num_processes(job: Job) -> int:
    """Worker processes on this host: one a GPU, or one on a CPU, unless the user says otherwise."""
    num_gpus = 0 if job.settings.use_cpu else job.environment.num_gpus
    return job.settings.nproc_per_node or num_gpus or 1


def torchrun_command(job: Job, arguments: Sequence[str]) -> list[str]:
    environment = job.environment
    command = [sys.executable, "-m", "llm_trainer.elastic", f"--nproc-per-node={num_processes(job)}"]
    if len(environment.hosts) > 1:
        command += [
            f"--nnodes={len(environment.hosts)}",
            f"--node-rank={environment.node_rank}",
            f"--master-addr={environment.hosts[0]}",
            f"--master-port={MASTER_PORT}",
        ]
    else:
        command += ["--local-addr=127.0.0.1"]  # else torchrun looks up its own name, for seconds where nobody answers
    return [*command, "--module", "llm_trainer.worker", *arguments]


def worker_variables(job: Job, scratch_dir: Path, started: float) -> dict[str, str]:
    """The workers' environment variables: caches off the small root disk, threads that share the cores, tokens."""
    variables = {
        "PYTHONUNBUFFERED": "1",
        "LLM_TRAINER_SCRATCH": str(scratch_dir),
        "LLM_TRAINER_STARTED": str(started),
        # torchrun would set 1, which halves the speed of a single CPU rank
        "OMP_NUM_THREADS": str(max(1, job.environment.num_cpus // num_processes(job))),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # carriage returns spoil CloudWatch's lines
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        **cache_variables(os.environ),
    }
    interface = job.environment.network_interface
    if interface and interface in {name for _, name in socket.if_nameindex()}:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    variables |= os.environ  # what the user sets in the job's Environment wins
    if Path(job.inputs.model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"  # nothing to fetch: look-ups would only wait for a network
    for name, secret in (("HF_TOKEN", job.settings.token), ("WANDB_API_KEY", job.settings.wandb_token)):
        if secret is not None:
            variables[name] = secret.get_secret_value()
    return variables


def cache_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Where libraries keep what they download and compile: the warm pool's folder if there is one, else /tmp."""
    root = Path(variables.get("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", tempfile.gettempdir()))
    return {
        "HF_HOME": str(root / "huggingface"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
    }


def run_to_end(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run a command, hand SIGTERM and SIGINT on to it, and return its exit code.

    As PID 1 this process has no default handlers, so without ours a stop would be ignored until SIGKILL.
    """
    child = subprocess.Popen(command, env=variables)

    def forward(signum: int, frame: FrameType | None) -> None:
        print(f"Received {signal.Signals(signum).name}: ending the worker processes.", flush=True)
        child.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
