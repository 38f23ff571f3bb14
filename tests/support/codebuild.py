# SPDX-License-Identifier: Apache-2.0
"""Runs a buildspec.yml of version 0.2 as AWS CodeBuild does, by its buildspec reference and phase transitions.

All commands of all phases run in one shell, so that `cd` and `export` last. Left out, as our buildspec does not use it:
parameter-store, secrets-manager, git-credential-helper, run-as, batch, cache, RETRY after a failure. runtime-versions
are the machine's. A phase that failed and says CONTINUE counts as a failed build.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

REGION = "us-west-2"
PHASES = ("install", "pre_build", "build", "post_build")
SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"
# What `make test-codebuild` would hand down, and CodeBuild's shell has not.
OF_MAKE = {"IMAGE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "REPOSITORY", "VARIANT"}


@dataclass
class Build:
    """What CodeBuild shows of a build that has ended."""

    log: Path
    artifacts: Path
    reports: Path
    phases: dict[str, str] = field(default_factory=dict)  # those that ran
    failed_commands: list[str] = field(default_factory=list)
    exported: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return FAILED if FAILED in self.phases.values() else SUCCEEDED


class Shell:
    """One shell that runs a command after the other. What they print goes to the log, its own answers to a pipe."""

    def __init__(self, name: str, folder: Path, variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [name],
            cwd=folder,
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def run(self, command: str) -> bool:
        """Whether it succeeded. One that ends the shell, such as `exit`, did not."""
        with self.log.open("a", encoding="utf-8") as log:
            print(f"[Container] {datetime.now(UTC):%Y/%m/%d %H:%M:%S} Running command {command}", file=log)
        self.write(f"eval {shlex.quote(command)} </dev/null >>{shlex.quote(str(self.log))} 2>&1")
        return self.ask("$?") == "0"

    def ask(self, expression: str) -> str:
        self.write(f'printf "%s\\n" "{expression}"')
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def write(self, line: str) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and does not answer
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def run_buildspec(source: Path, output: Path, variables: Mapping[str, str], revision: str) -> Build:
    """Build the source. `variables` are the project's, which come before the buildspec's own."""
    spec = yaml.safe_load((source / "buildspec.yml").read_text(encoding="utf-8"))
    assert spec["version"] == 0.2
    env = spec.get("env", {})
    build = Build(output / "build.log", output / "artifacts", output / "reports")
    output.mkdir(parents=True)
    inherited = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
    of_codebuild = {
        "CI": "true",
        "CODEBUILD_BUILD_ID": "llm-trainer:00000000-0000-0000-0000-000000000000",
        "CODEBUILD_BUILD_SUCCEEDING": "1",
        "CODEBUILD_RESOLVED_SOURCE_VERSION": revision,
        "CODEBUILD_SRC_DIR": str(source),
    }
    environment = {**inherited, **of_codebuild, **env.get("variables", {}), **variables}
    shell = Shell(env.get("shell", "/bin/sh"), source, environment, build.log)
    try:
        for name, phase in list_phases(spec["phases"], build):
            build.phases[name] = run_phase(shell, phase, build)
        build.exported = {name: shell.ask(f"$(printenv {name})") for name in env.get("exported-variables", [])}
    finally:
        shell.end()
    for report in spec.get("reports", {}).values():
        collect(source, report, build.reports)
    collect(source, spec.get("artifacts", {"files": []}), build.artifacts)
    return build


def list_phases(phases: Mapping[str, Any], build: Build) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The phases that run: after one that failed the next if it says CONTINUE, and post_build after build unless that
    says ABORT."""
    for name in PHASES:
        if name not in phases:
            continue
        yield name, phases[name]
        on_failure = phases[name].get("on-failure", "CONTINUE" if name == "build" else "ABORT")
        if build.phases[name] == FAILED and on_failure == "ABORT":
            return


def run_phase(shell: Shell, phase: Mapping[str, Any], build: Build) -> str:
    """The first command that fails ends the phase; its `finally` runs in any case."""
    status = SUCCEEDED
    for block in ("commands", "finally"):
        for command in phase.get(block, []):
            if not shell.run(command):
                build.failed_commands.append(command)
                shell.write("export CODEBUILD_BUILD_SUCCEEDING=0")
                status = FAILED
                break
    return status


def collect(source: Path, asked: Mapping[str, Any], destination: Path) -> None:
    """Copy what is there of the files of `artifacts` or of one of the `reports`."""
    folder = source / asked.get("base-directory", ".")
    for pattern in asked["files"]:
        for file in sorted(folder.glob(pattern)):
            target = destination / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
