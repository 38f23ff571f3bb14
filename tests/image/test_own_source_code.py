# SPDX-License-Identifier: Apache-2.0
"""Users' own scripts: those that SageMaker's training toolkit runs (SDK v2), and ModelTrainer's source_code (SDK v3).

ModelTrainer replaces the entrypoint with drivers of its own: what they call has to be there.
"""

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from support.waiting import wait_until

SHIM = Path(__file__).parents[2] / "examples/source_code/train.py"
UNPRIVILEGED = ("--user=12345:12345", "--read-only", "--tmpfs=/tmp")
OWN = """
import json, shutil, sys
import llm_trainer, users_own
print("own " + json.dumps([sys.argv[1:], shutil.which("torchrun")]))
"""
SAVE_WHEN_STOPPED = """
import pathlib, signal, sys, time
def save(signum, frame):
    pathlib.Path("/opt/ml/model/saved").write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("training")
time.sleep(120)
"""

SCRIPT = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {total.item()} {sys.argv[1:]}")
dist.destroy_process_group()
"""
PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "users-own"
version = "1.0"
[tool.setuptools]
py-modules = ["users_own"]
"""


@pytest.fixture
def run_in_code_channel(image, tree):
    """Runs a shell script where the drivers run: in the folder of the channel `code`."""

    def run(script: str) -> str:
        options = [f"--volume={tree.base_dir}:/opt/ml", "--workdir=/opt/ml/input/data/code"]
        return image.run_bash(script, options)

    return run


def test_torchrun_runs_a_users_script(tree, run_in_code_channel):
    tree.write("input/data/code/own.py", SCRIPT)
    output = run_in_code_channel("torchrun --nnodes=1 --nproc_per_node=2 own.py --epochs 1")
    for rank in (0, 1):
        assert f"rank {rank} of 2: 3.0 ['--epochs', '1']" in output


def test_pip_installs_what_a_users_script_requires(tree, run_in_code_channel):
    tree.write("input/data/code/package/pyproject.toml", PACKAGE)
    tree.write("input/data/code/package/users_own.py", "print('imported')")
    tree.write("input/data/code/requirements.txt", "./package\n")
    output = run_in_code_channel(
        "pip install --no-index --no-build-isolation -r requirements.txt && python -c 'import users_own'"
    )
    assert output.endswith("imported\n")


def test_our_package_runs_as_a_users_command(run_in_code_channel):
    assert "usage: llm-trainer" in run_in_code_channel("python -m llm_trainer --help")


def submit(tree, files: dict[str, str], **hyperparameters) -> None:
    """Name a job's script as SDK v2 does: an archive, and every value in JSON."""
    archive = tree.base_dir / "input/data/code/sourcedir.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content.encode()))
    given = {
        "sagemaker_program": "train.py",
        "sagemaker_submit_directory": "/opt/ml/input/data/code/sourcedir.tar.gz",
        **hyperparameters,
    }
    tree.write_job({name: json.dumps(value) for name, value in given.items()}, ("train", "code"))


@pytest.mark.parametrize("options", [(), UNPRIVILEGED], ids=["root", "random-user-on-a-read-only-root"])
def test_the_toolkit_runs_a_users_script_with_its_requirements(image, tree, options):
    files = {
        "train.py": OWN,
        "requirements.txt": "--no-index\n./package\n",
        "package/pyproject.toml": PACKAGE,
        "package/users_own.py": "",
    }
    submit(tree, files, layers=[1, 2], note="don't stop", packing=True)
    # Nothing to build with can be fetched: pip takes the environment's own setuptools.
    result = image.run_job(
        tree.base_dir, "train", options=["--network=none", "--env=PIP_NO_BUILD_ISOLATION=0", *options]
    )
    assert result.returncode == 0, result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("own ")]
    arguments = ["--layers", "[1, 2]", "--note", "don't stop", "--packing", "True"]
    assert json.loads(line.removeprefix("own ")) == [arguments, "/opt/llm-trainer/venv/bin/torchrun"]


def test_a_users_script_that_fails_is_told_with_its_error(image, tree):
    submit(tree, {"train.py": "raise ValueError('no rows')"})
    result = image.run_job(tree.base_dir, "train")
    assert result.returncode == 1
    assert tree.failure == "train.py ended with exit code 1: ValueError: no rows"


def test_a_stop_reaches_a_users_script_which_may_end_well(image, tree):
    submit(tree, {"train.py": SAVE_WHEN_STOPPED})
    container = f"llm-trainer-own-{tree.base_dir.name}"
    volume = f"--volume={tree.base_dir}:/opt/ml"

    def docker(*arguments: str) -> str:
        return subprocess.run([image.docker, *arguments], check=True, capture_output=True, text=True).stdout

    docker("run", "--detach", "--name", container, volume, image.name, "train")
    try:
        wait_until(lambda: "training\n" in docker("logs", container))
        docker("stop", "--time=60", container)
        assert int(docker("inspect", "--format={{.State.ExitCode}}", container)) == 0
    finally:
        subprocess.run([image.docker, "rm", "--force", container], check=False, capture_output=True)
    assert tree.model_files == {"saved"}


def test_the_shim_trains_as_a_users_script(tree, run_in_code_channel):
    (tree.base_dir / "input/data/code").mkdir()
    shutil.copy(SHIM, tree.base_dir / "input/data/code")
    run_in_code_channel("python3 train.py --learning_rate 0.01 --mlflow_uri '' --run_name --odd")
    assert "adapter_model.safetensors" in tree.model_files
