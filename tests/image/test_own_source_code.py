# SPDX-License-Identifier: Apache-2.0
"""ModelTrainer with its own source_code replaces the entrypoint: what its drivers call has to be there."""

import pytest

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
