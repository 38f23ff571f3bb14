# SPDX-License-Identifier: Apache-2.0
"""A user's own script in place of our training: SageMaker's training toolkit installs and runs it, as our child.

The toolkit provides the script's folder, requirements, arguments and SM_* variables. This module adds what it lacks: a
stop signal reaches the script, and the failure names its cause first. Only an end that was reported as success is one.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, write_failure
from llm_trainer.common.files import find_denial, read_json_object, write_text
from llm_trainer.common.processes import PYTHON
from llm_trainer.common.redaction import note_secrets
from llm_trainer.config.hyperparameter_decoding import decode_value
from llm_trainer.launcher.process_tree import build_tree_command
from llm_trainer.launcher.script_output import OutputCopier
from llm_trainer.launcher.stop_signal import find_early_stop

# By module and not by its console script `train`. The script itself, which the toolkit starts, imports its neighbours.
TOOLKIT = [*PYTHON, "-m", "sagemaker_training.cli.train"]
SHELLS = ("bash", "dash", "sh", "busybox")
MAX_LATE_OUTPUT_SECONDS = 5
CODE_DEPTH = 16  # folders in each other that a script's code may have
# How Python ends, also with torchrun's rank before it and without its script: "ValueError: no rows".
PYTHON_ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .*\S|.*: can't open file .*\S)", re.MULTILINE
)
PIP_ERROR = re.compile(r"^(ERROR: .*\S)", re.MULTILINE)


def names_a_script(hyperparameters: Mapping[str, Any]) -> bool:
    """Tell whether the job asks for a user's script; from within one, which may call our training, it does not."""
    return find_script(hyperparameters) is not None and "SM_USER_ENTRY_POINT" not in os.environ


def find_script(hyperparameters: Mapping[str, Any]) -> str | None:
    """Return the name of the user's script; None where the job names none."""
    value = decode_value(str(hyperparameters.get("sagemaker_program", "")), frozenset({"str"}), nullable=True)
    return None if value is None else str(value)


def run_script(base_dir: Path, hyperparameters: Mapping[str, Any], variables: Mapping[str, str]) -> int:
    """Run the script that the job names. Return the container's exit code: 0 if it ended with 0, else 1.

    `variables` are the environment of toolkit and script. After a stop the script is not begun.
    Raises PermissionError where the tree cannot be written, and UserError where its code cannot be read.
    """
    note_secrets(hyperparameters)
    output_dir = base_dir / "output"
    output_dir.mkdir(parents=True, exist_ok=True)  # where the toolkit cannot write a failure, it ends with exit code 0
    (output_dir / "success").unlink(missing_ok=True)  # left by an earlier job in the same tree
    if early := find_early_stop():
        log.info(f"Received {early.name} before the script began: it is not started.")
        return 0
    provide_code(base_dir, hyperparameters)
    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        exit_code, last_errors = run_toolkit(toolkit_variables(base_dir, variables, Path(scratch_dir)))
    if exit_code == 0 and (output_dir / "success").exists():
        return 0
    explain_failure(output_dir, find_script(hyperparameters) or "", exit_code, last_errors)
    return 1


def provide_code(base_dir: Path, hyperparameters: Mapping[str, Any]) -> None:
    """Copy the channel `code` to the toolkit's folder of scripts, for a job that names no folder to fetch them from.

    Raises UserError where this user may not read it.
    """
    channel, code_dir = base_dir / "input" / "data" / "code", base_dir / "code"
    is_provided = "sagemaker_submit_directory" in hyperparameters or (code_dir.is_dir() and any(code_dir.iterdir()))
    if denied := list(find_denial(channel, CODE_DEPTH)):
        raise UserError(*denied)
    if channel.is_dir() and not is_provided:
        shutil.copytree(channel, code_dir, dirs_exist_ok=True)


def toolkit_variables(base_dir: Path, variables: Mapping[str, str], scratch_dir: Path) -> dict[str, str]:
    """Return the given variables, and those by which the script finds this environment's commands and packages."""
    search_path = [sysconfig.get_path("scripts"), *variables.get("PATH", os.defpath).split(os.pathsep)]
    changed = {"SAGEMAKER_BASE_DIR": str(base_dir)}
    resources = read_json_object(base_dir / "input" / "config" / "resourceconfig.json")
    if len(resources.get("hosts", [])) < 2:
        # No other host to wait for: the toolkit would look up its own name, for 15 minutes where nobody answers.
        changed["SM_STUDIO_LOCAL_MODE"] = "true"
    if not os.access(sysconfig.get_path("purelib"), os.W_OK):
        # A read-only root or a user other than root: pip installs the script's requirements beside the environment.
        prefix = {"base": str(scratch_dir), "platbase": str(scratch_dir)}
        scheme = sysconfig.get_preferred_scheme("prefix")
        search_path.insert(0, sysconfig.get_path("scripts", scheme, prefix))
        python_path = [sysconfig.get_path("purelib", scheme, prefix), variables.get("PYTHONPATH", "")]
        changed |= {"PIP_PREFIX": str(scratch_dir), "PYTHONPATH": os.pathsep.join(filter(None, python_path))}
    return {**variables, **changed, "PATH": os.pathsep.join(search_path)}


def run_toolkit(variables: Mapping[str, str]) -> tuple[int, str]:
    """Run the toolkit, and forward SIGTERM and SIGINT to the script.

    Returns the toolkit's exit code and the end of its standard error.
    """
    # A session of its own: Ctrl-C in a terminal reaches this process alone, which knows whom to hand it on to.
    command = build_tree_command(TOOLKIT)
    pipe = subprocess.PIPE
    tree = subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, start_new_session=True)
    assert tree.stdout is not None and tree.stderr is not None
    errors = OutputCopier(tree.stderr, sys.stderr.buffer)
    copiers = [OutputCopier(tree.stdout, sys.stdout.buffer), errors]
    for copier in copiers:
        copier.start()

    def forward(signum: int, frame: FrameType | None) -> None:
        log.info(f"Received {signal.Signals(signum).name}: handing it on to the script.")
        forward_signal(signum, tree.pid)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        exit_code = tree.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    for copier in copiers:
        copier.join(MAX_LATE_OUTPUT_SECONDS)  # bounded: a process that the script left behind may hold the pipe open
    return exit_code, errors.kept.decode(errors="replace")


def forward_signal(signum: int, tree_pid: int) -> None:
    """Send a signal to the script, or to the toolkit where no script runs yet: the toolkit would only die of it."""
    try:
        tree = psutil.Process(tree_pid)
        toolkit = next(iter(tree.children()), tree)  # the toolkit may not have been started yet
        command = toolkit.cmdline()
        receivers = [found for child in toolkit.children() for found in find_receivers(signum, child, command)]
        for process in receivers or [toolkit]:
            process.send_signal(signum)
    except psutil.NoSuchProcess:
        return  # it has just ended


def find_receivers(signum: int, process: psutil.Process, toolkit_command: list[str]) -> list[psutil.Process]:
    """List the processes that should get a signal: the given one, or its children where it is a shell without a trap.

    Such a shell would die at once, and with it the job, while its command still saves its work. A script's other
    children are its own affair: data loader workers that die of the signal would fail the script that waits for them.
    """
    try:
        if process.cmdline() == toolkit_command:
            return []  # the toolkit's fork that uploads output/intermediate, until the toolkit ends it
        below = process.children()
        if below and Path(process.exe()).name in SHELLS and not has_signal_handler(signum, process.pid):
            return [receiver for child in below for receiver in find_receivers(signum, child, toolkit_command)]
    except (psutil.NoSuchProcess, FileNotFoundError):
        return []  # it has just ended
    return [process]


def has_signal_handler(signum: int, pid: int) -> bool:
    """Tell whether a process has a handler for a signal, as a shell with a trap has."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (signum - 1) & 1)


def explain_failure(output_dir: Path, script: str, exit_code: int, last_errors: str) -> None:
    """Replace the toolkit's report by one sentence. A failure file of the script itself stays, without secrets."""
    failure = output_dir / "failure"
    report = failure.read_text(encoding="utf-8", errors="replace") if failure.exists() else ""
    ended = re.match(r"(Execute|Install)\w+Error:\nExitCode (-?\d+)\n", report)
    if ended and ended[1] == "Install":
        reason = describe_end(f"Installing what {script} needs", int(ended[2]), PIP_ERROR.findall(last_errors))
    elif ended:
        reason = describe_end(script, int(ended[2]), PYTHON_ERROR.findall(last_errors))
    elif report.startswith("Framework Error:"):  # a traceback of the toolkit's, with the cause at its end
        reason = f"{script} could not be started: {report.splitlines()[-1]}"
    elif report:
        write_text(failure, report, errors="replace")
        return
    else:
        errors = PYTHON_ERROR.findall(last_errors)
        reason = describe_end(f"SageMaker's training toolkit, which runs {script},", exit_code, errors)
    log.error(reason)
    failure.unlink(missing_ok=True)
    write_failure(output_dir, reason)


def describe_end(what: str, exit_code: int, errors: list[str]) -> str:
    """Return a sentence about how a process ended; `errors` are the last lines that name errors."""
    if exit_code == -signal.SIGKILL:
        return f"{what} was killed by SIGKILL, most likely because the host ran out of memory."
    if exit_code < 0:
        return f"{what} was stopped by {signal.Signals(-exit_code).name}."
    return f"{what} ended with exit code {exit_code}: {errors[-1] if errors else 'the log above says why.'}"
