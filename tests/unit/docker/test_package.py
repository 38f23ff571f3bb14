# SPDX-License-Identifier: Apache-2.0
"""The package that docker/Dockerfile builds from what it copies: every file of ours is in it, and is found there."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.measures import ROOT

# Each of these reads a file that lies beside its module.
READ_DATA = """
from llm_trainer.aws.lmi_image import find_lmi_image
from llm_trainer.model.memory.gpus import read_gpus
from llm_trainer.planning import efficiency, instances
print(instances.__file__, instances.read_instances().made_on, len(read_gpus()))
print(efficiency.find_efficiency("H200").source, find_lmi_image("us-east-1"))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of the package as pip installs it: built in a folder with what the stage `package` copies."""
    source, wheels, installed = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    (stage,) = re.findall(
        r"^FROM builder AS package$(.*?)^FROM ", (ROOT / "docker/Dockerfile").read_text(), re.M | re.S
    )
    for name in " ".join(re.findall(r"^COPY (.+) \S+$", stage, re.M)).split():
        copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, wheels], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(installed)
    return installed / "llm_trainer"


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        shutil.copy(source, target)


def list_files(folder: Path) -> set[Path]:
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file for file in files if "__pycache__" not in file.parts}


def test_every_file_of_ours_is_in_the_package(package):
    assert list_files(package) == list_files(ROOT / "code/llm_trainer")


def test_data_are_read_from_where_the_package_is(package):
    command = [sys.executable, "-P", "-c", READ_DATA]
    variables = {"PYTHONPATH": str(package.parent)}
    printed = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"{package}/planning/instances.py 20")
    assert ".amazonaws.com/djl-inference:" in printed
