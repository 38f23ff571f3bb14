# SPDX-License-Identifier: Apache-2.0
"""When an image gets the libraries for EFA. tests/image/test_efa.py tries docker/efa.sh in a build."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
BASE = f"BASE_IMAGE=base@sha256:{'0' * 64}"


@pytest.fixture
def find_source(tmp_path):
    """Tells where a build with these words would take the libraries from. It is not run."""
    (tmp_path / "docker/efa").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)

    def dry_run(*words: str, has_tarball: bool = False) -> str:
        if has_tarball:
            (tmp_path / "docker/efa/aws-efa-installer-1.49.0.tar.gz").touch()
        command = ["make", "--dry-run", "image", BASE, "BUILDER_IMAGE=builder", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        (source,) = re.findall(r"--build-arg EFA=(\S*)", result.stdout)
        return source

    return dry_run


@pytest.mark.parametrize(
    ("words", "has_tarball", "source"),
    [
        ((), False, "none"),
        (("EFA=0",), False, "none"),
        (("EFA=1",), False, "download"),
        ((), True, "folder"),
        (("EFA=1",), True, "folder"),
        (("EFA=0",), True, "none"),
    ],
)
def test_efa_is_off_until_it_is_asked_for_or_a_tarball_is_there(find_source, words, has_tarball, source):
    assert find_source(*words, has_tarball=has_tarball) == source


@pytest.mark.parametrize(("variant", "efa"), [("cuda", "EFA=1"), ("cpu", "EFA=")])
def test_codebuild_has_it_in_the_cuda_image(variant, efa):
    commands = yaml.safe_load((ROOT / "buildspec.yml").read_text(encoding="utf-8"))["phases"]["build"]["commands"]
    (command,) = [command for command in commands if command.startswith("make image ")]
    script = f'make() {{ printf "%s\\n" "$@"; }}; {command}'
    variables = {**os.environ, "VARIANT": variant, "REPOSITORY": "here/trainer"}
    result = subprocess.run(["bash", "-ec", script], env=variables, capture_output=True, text=True, check=True)
    assert f"VARIANT={variant}\n{efa}\n" in result.stdout


def test_the_downloaded_installer_is_pinned_by_version_and_digest():
    dockerfile = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG EFA_VERSION=\d+\.\d+\.\d+$", dockerfile, re.MULTILINE)
    assert re.search(r"^ARG EFA_SHA256=[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    assert "ADD https://efa-installer.amazonaws.com/aws-efa-installer-${EFA_VERSION}.tar.gz /" in dockerfile
