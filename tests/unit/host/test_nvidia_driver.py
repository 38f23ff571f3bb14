# SPDX-License-Identifier: Apache-2.0
"""cuda-compat is put before the host's libcuda for an older driver only, and torch's CUDA is known without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trainer.host.nvidia_driver import build_driver_variables, find_compat_version, find_torch_cuda


@pytest.fixture
def compat_dir(tmp_path) -> Path:
    """/usr/local/cuda/compat as NVIDIA's package fills it."""
    folder = tmp_path / "compat"
    folder.mkdir()
    (folder / "libcuda.so.580.95.05").touch()
    (folder / "libcuda.so.1").symlink_to("libcuda.so.580.95.05")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder


def ask(expression: str, variables: dict[str, str]):
    """What an expression gives in a process with these variables, where torch stays unimported."""
    code = f"""
import json, os, sys
from pathlib import Path
from llm_trainer.host.nvidia_driver import *
print(json.dumps({expression}))
assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("driver", ["570.172.08", "535.183.01"])
def test_compat_comes_first_for_an_older_driver(fake_nvml, compat_dir, driver):
    variables = fake_nvml(driver=driver)
    assert ask(f"build_driver_variables(os.environ, Path({str(compat_dir)!r}))", variables) == {
        "LD_LIBRARY_PATH": f"{compat_dir}:{variables['LD_LIBRARY_PATH']}"
    }


# In one branch (580) the CUDA version is the same, and compat would only break GeForce cards.
@pytest.mark.parametrize("driver", ["580.95.05", "580.65.06", "590.44.01"])
def test_compat_is_left_alone_for_a_driver_as_new(fake_nvml, compat_dir, driver):
    assert ask(f"build_driver_variables(os.environ, Path({str(compat_dir)!r}))", fake_nvml(driver=driver)) == {}


def test_without_compat_or_driver_nothing_is_set(fake_nvml, compat_dir, tmp_path):
    assert (
        ask(f"build_driver_variables(os.environ, Path({str(tmp_path / 'none')!r}))", fake_nvml(driver="535.183.01"))
        == {}
    )
    assert build_driver_variables({}, compat_dir) == {}


def test_compats_version_is_that_of_its_library(compat_dir, tmp_path):
    assert find_compat_version(compat_dir) == "580.95.05"
    assert find_compat_version(tmp_path / "none") is None


def test_a_driver_is_read_with_its_gpus(fake_nvml):
    assert ask("read_driver().version", fake_nvml(driver="570.172.08")) == "570.172.08"
    assert ask("read_driver().cuda", fake_nvml(cuda="12.8")) == "12.8"
    assert ask("read_driver().cuda", fake_nvml(cuda="")) is None
    assert ask("len(read_driver().gpus)", fake_nvml(gpus=4)) == 4


def test_torchs_cuda_is_read_from_its_files(tmp_path):
    import torch

    assert find_torch_cuda() == torch.version.cuda
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\n")
    assert ask("find_torch_cuda()", {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}) == "13.0"
