# SPDX-License-Identifier: Apache-2.0
"""The wheel of flash-attn that an image gets: the one at hand, or none where there is nothing to compile it for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
TAGS = "cu13torch2.13cxx11abiTRUE-cp312-cp312-linux_x86_64"


@pytest.mark.parametrize("at_hand", [True, False])
def test_without_architectures_nothing_is_compiled(tmp_path, at_hand):
    """Even so a wheel at hand is taken."""
    for folder in ("docker/requirements", "docker/wheels", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(DOCKER / "flash-attn.sh", tmp_path / "docker")
    (tmp_path / "docker/requirements/flash-attn.txt").write_text("flash-attn==2.8.3\n")
    wheel = tmp_path / f"docker/wheels/flash_attn-2.8.3+{TAGS}.whl"
    if at_hand:
        wheel.write_text("wheel")
    python = tmp_path / "bin/python"  # of an image, with its torch
    python.write_text(f"#!/bin/sh\necho {TAGS}\n")
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "FLASH_ATTN_CUDA_ARCHS": ""}
    script, output = tmp_path / "docker/flash-attn.sh", tmp_path / "output"
    run = subprocess.run([script, output], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert [each.name for each in output.iterdir()] == ([wheel.name] if at_hand else [])
    assert ("is at hand" if at_hand else "left out") in run.stdout
