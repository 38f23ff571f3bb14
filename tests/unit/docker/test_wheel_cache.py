# SPDX-License-Identifier: Apache-2.0
"""An image without flash-attn: one variable leaves it out, of the image and of what the cache would compile."""

import os
import subprocess

import pytest

from support.measures import ROOT

GIVEN = '--build-arg "FLASH_ATTN_CUDA_ARCHS={}"'


def run(*words, **variables):
    """Run a command in the project's folder, with the variables alone that are given, and return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLASH_", "MAKE", "MFLAGS"))}
    return subprocess.run(
        words, cwd=ROOT, env={**inherited, **variables}, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("goal", ["image", "flash-attn", "push-cache"])
@pytest.mark.parametrize("archs", ["", "80;90"])
def test_the_build_is_told_what_the_variable_says(goal, archs):
    by_word = run("make", "--dry-run", goal, "VARIANT=cuda", "CACHE=here:1", f"FLASH_ATTN_CUDA_ARCHS={archs}")
    by_environment = run("make", "--dry-run", goal, "VARIANT=cuda", "CACHE=here:1", FLASH_ATTN_CUDA_ARCHS=archs)
    assert GIVEN.format(archs) in by_word
    assert GIVEN.format(archs) in by_environment


def test_without_the_variable_the_dockerfile_decides():
    assert "FLASH_ATTN_CUDA_ARCHS" not in run("make", "--dry-run", "image", "VARIANT=cuda")
    assert "-sm-80-90-100-120-" in run("docker/wheel_cache.sh", "key")
    assert "-sm-90-" in run("docker/wheel_cache.sh", "key", FLASH_ATTN_CUDA_ARCHS="90")


@pytest.mark.parametrize("way", ["word", "environment"])
def test_nothing_is_fetched_or_compiled_for_an_image_without_it(tmp_path, way):
    (tmp_path / "aws").write_text("#!/bin/sh\nexit 1\n")  # nothing that could be asked
    (tmp_path / "aws").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["make", "flash-attn-cached", "VARIANT=cuda", "CACHE_FOLDER=s3://bucket/cache", "WHEEL_DIGESTS=/digests"]
    if way == "word":
        words.append("FLASH_ATTN_CUDA_ARCHS=")
    else:
        variables["FLASH_ATTN_CUDA_ARCHS"] = ""
    assert "flash-attn: left out" in run(*words, **variables)
