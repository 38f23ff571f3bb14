# SPDX-License-Identifier: Apache-2.0
"""The locked requirements: nothing of them is particular to the machine that resolved them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docker/requirements"
# What wheels for Ubuntu 24.04, the cuda image's base, may be tagged with.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.txt")), ids=lambda file: file.name)
def test_a_lock_names_no_address_and_no_path(file):
    assert not re.search(r"://|^--(?!hash)|file:|/opt/|/tmp/", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.txt")), ids=lambda file: file.name)
def test_every_pin_has_a_hash(file):
    pins = re.findall(r"^[^\s#].*?==(?:.*\\\n)*.*", file.read_text(), re.MULTILINE)
    assert pins
    assert all("--hash=sha256:" in pin for pin in pins)


def test_the_cuda_lock_resolves_for_the_bases_python(tmp_path):
    """Metadata only: nothing is downloaded but the three packages that have no wheel."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--require-hashes"),
            *("--only-binary=:all:", "--no-binary=docopt,inotify-simple,sagemaker-training", "--no-build-isolation"),
            *("--python-version=3.12", *(f"--platform={platform}" for platform in PLATFORMS)),
            *("--target", str(tmp_path), "-r", str(FOLDER / "cuda.txt")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
