# SPDX-License-Identifier: Apache-2.0
"""A checkout of the source as CodeBuild has it, and commands that are run in it."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2]


def call(*command: str | Path, **options: Any) -> str:
    """What a command prints; where it fails, the failure shows all of it."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert run.returncode == 0, f"{command}:\n{run.stdout}"
    return run.stdout


def read_version() -> str:
    """Return the version of the source, without importing it: CodeBuild's Python does not have the package."""
    text = (SOURCE / "code/llm_trainer/__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def remove_images(docker: str, repository: str) -> None:
    """From this machine; the registry keeps what was pushed."""
    names = call(docker, "images", "--format", "{{.Repository}}:{{.Tag}}", repository).split()
    names += call(docker, "images", "--digests", "--format", "{{.Repository}}@{{.Digest}}", repository).split()
    for name in names:
        if "<none>" not in name:
            subprocess.run([docker, "rmi", name], capture_output=True)


@dataclass(frozen=True)
class Checkout:
    """The source as CodeBuild has it: a clone of one commit, in a folder of its own."""

    folder: Path

    def git(self, *arguments: str) -> str:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
        return call("git", *who, *arguments, cwd=self.folder).strip()

    @property
    def revision(self) -> str:
        return self.git("rev-parse", "HEAD")

    def commit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")
        self.git("commit", "--quiet", "--message", "Planted by the test", path)
