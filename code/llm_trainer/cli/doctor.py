# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer doctor`: whether a job would run well on this machine.

It looks at the machine, tries the addresses of the trackers, and sums a tensor over the devices. It prints a line for
each finding as soon as it is known, and no value of a setting: some are secret.
"""

import contextlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import psutil

from llm_trainer.common.errors import UserError
from llm_trainer.common.processes import PYTHON, SAFE_PATH, bind_command
from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.config.sections import TrackingSettings
from llm_trainer.config.tracker_choice import choose_trackers, find_mlflow_uri
from llm_trainer.host.findings import Finding, format_finding, wants_colours
from llm_trainer.host.machine import inspect_machine
from llm_trainer.host.network import build_network_variables
from llm_trainer.host.nvidia_driver import build_driver_variables, find_torch_cuda
from llm_trainer.job.job import collect_settings

CONNECT_SECONDS = 5
SELF_TEST_SECONDS = 120
WANDB_URL = "https://api.wandb.ai"


def diagnose(words: Sequence[str]) -> int:
    """Print what is found on this machine, and return the exit code: 1 when a job would fail.

    The words are settings, which decide which trackers are tried.
    """
    try:
        environment = read_environment()
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    verdicts = []
    for finding in examine_machine(environment, words):
        print(format_finding(finding, in_colour=wants_colours()), flush=True)
        verdicts.append(finding.verdict)
    errors, warnings = verdicts.count("error"), verdicts.count("warning")
    print(f"errors: {errors}, warnings: {warnings}; a job would {'fail' if errors else 'run'} here.")
    return 1 if errors else 0


def examine_machine(environment: Environment, words: Sequence[str]) -> Iterator[Finding]:
    """Yield all findings: on the machine, the settings, the trackers and the devices."""
    settings, problems = collect_settings(environment, words)
    yield Finding("launcher", "ok", environment.placement.describe())
    if environment.placement.warning:
        yield Finding("launcher", "warning", environment.placement.warning)
    yield from inspect_machine(environment, settings.parallelism.require_efa)
    torch_cuda = find_torch_cuda()
    yield inspect_nccl(torch_cuda)
    if problems:
        yield Finding("settings", "warning", f"1 of {len(problems)} problems: {problems[0]}")
    yield from try_trackers(settings.tracking, os.environ)
    yield try_all_reduce(environment, num_gpus=environment.num_gpus if torch_cuda else 0)


def inspect_nccl(torch_cuda: str | None) -> Finding:
    """Return the version of NCCL that belongs to torch's CUDA, whose version is given, or None for a CPU build."""
    if torch_cuda is None:
        return Finding("NCCL", "ok", "none (CPU build)")
    package = f"nvidia-nccl-cu{torch_cuda.partition('.')[0]}"
    try:
        return Finding("NCCL", "ok", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding("NCCL", "ok", f"of an unknown version ({package} is not installed)")


def try_trackers(settings: TrackingSettings, variables: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether each tracker that the job would have can be reached."""
    trackers = choose_trackers(settings, variables)
    uri = find_mlflow_uri(settings, variables)
    if "mlflow" in trackers and uri is not None:
        if urlsplit(uri).scheme in ("http", "https"):
            yield try_address("MLflow", uri)
        else:
            yield Finding("MLflow", "ok", "its address is no http address: not tried")
    if "wandb" in trackers and variables.get("WANDB_MODE") != "offline":
        yield try_address("W&B", variables.get("WANDB_BASE_URL", WANDB_URL))


def try_address(subject: str, url: str) -> Finding:
    """Return whether something listens at a URL. Only host and port are shown: a URL can carry a password."""
    address = urlsplit(url)
    try:
        host, port = address.hostname or "", address.port or {"http": 80}.get(address.scheme, 443)
    except ValueError as error:
        return Finding(subject, "warning", f"its address is not valid ({error}): training goes on untracked; mend it.")
    started = time.perf_counter()
    problem = find_connection_problem(host, port)
    if problem is None:
        return Finding(subject, "ok", f"{host}:{port} answers after {time.perf_counter() - started:.1f} s")
    text = (
        f"{host}:{port} cannot be reached ({problem}), and training would go on untracked: "
        "check the address, and that the job's network and VPC lead there."
    )
    return Finding(subject, "warning", text)


def find_connection_problem(host: str, port: int) -> str | None:
    """Return what keeps a TCP connection from being made, or None.

    A thread makes it, because looking up a name has no time limit.
    """
    problems = [f"no answer within {CONNECT_SECONDS} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError as error:
            problems.append(str(error))
        else:
            problems.clear()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return problems[-1] if problems else None


def try_all_reduce(environment: Environment, num_gpus: int) -> Finding:
    """Return whether the processes of a job can sum a tensor: over NCCL, or two over Gloo where there is no GPU."""
    what = f"over {num_gpus} GPUs by NCCL" if num_gpus else "over 2 CPU processes by Gloo"
    started = time.perf_counter()
    output, exit_code = run_self_test(environment, num_gpus or 2, "nccl" if num_gpus else "gloo")
    seconds = time.perf_counter() - started
    if exit_code is None:
        text = (
            f"{what}: no end within {SELF_TEST_SECONDS} s (last line: {find_last_useful_line(output)}): "
            "run it again with NCCL_DEBUG=INFO to see what it waits for."
        )
        return Finding("all-reduce", "error", text)
    if exit_code != 0:
        text = f"{what} failed ({find_last_useful_line(output)}): mend the errors above, or see with NCCL_DEBUG=INFO."
        return Finding("all-reduce", "error", text)
    bandwidth = re.search(r"^bus_gb_per_second=([\d.]+)$", output, re.MULTILINE)
    measured = f", bus bandwidth {bandwidth[1]} GB/s for 64 MiB" if bandwidth and num_gpus > 1 else ""
    return Finding("all-reduce", "ok", f"{what}: right sum, {seconds:.1f} s{measured}")


def run_self_test(environment: Environment, num_processes: int, backend: str) -> tuple[str, int | None]:
    """Return the output and the exit code of torchrun. The exit code is None when its time was up."""
    torchrun = [*PYTHON, "-m", "llm_trainer.launcher.torchrun", "--standalone", "--local-addr=127.0.0.1"]
    worker = [*PYTHON, "-m", "llm_trainer.cli.all_reduce", backend]
    child = subprocess.Popen(
        bind_command([*torchrun, f"--nproc-per-node={num_processes}", "--", *worker]),
        env={
            "OMP_NUM_THREADS": "1",
            **build_network_variables(environment),
            **os.environ,
            **build_driver_variables(os.environ),
            **SAFE_PATH,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = child.communicate(timeout=SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return child.communicate()[0], None
    return output, child.returncode


def find_last_useful_line(output: str) -> str:
    """Return the last line that names an error of a worker, else the last line.

    Torchrun's own report of the error does not count.
    """
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line.strip()) for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*Error\b", line) and "ChildFailedError" not in line]
    return (errors or lines or ["no output"])[-1]
