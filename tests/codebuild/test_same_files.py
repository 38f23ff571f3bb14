# SPDX-License-Identifier: Apache-2.0
"""docker/same_files.py, which `make reproducible` asks, tells two images apart by anything but times."""

import os
import subprocess
import sys

import pytest

from support.checkout import SOURCE, call, remove_images

NAME = "llm-trainer-test-same"
DOCKERFILE = 'FROM scratch\nCOPY . /\nENTRYPOINT ["/file"]\n'


@pytest.fixture
def make_image(docker, tmp_path):
    """An image with one file and a link to it; its name."""

    def build(tag, content="same", mode=0o644, target="file", modified=0):
        folder = tmp_path / tag
        folder.mkdir()
        (folder / "Dockerfile").write_text(DOCKERFILE, encoding="utf-8")
        (folder / "file").write_text(content, encoding="utf-8")
        (folder / "file").chmod(mode)
        (folder / "link").symlink_to(target)
        os.utime(folder / "file", (modified, modified))
        call(docker, "build", "--quiet", "--no-cache", "--tag", f"{NAME}:{tag}", folder)
        return f"{NAME}:{tag}"

    yield build
    remove_images(docker, NAME)


@pytest.fixture
def compare(docker):
    def run(*images):
        command = [sys.executable, SOURCE / "docker/same_files.py", *images, "--docker", docker]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


def test_times_alone_make_no_difference(make_image, compare):
    result = compare(make_image("first"), make_image("second", modified=10**9))
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" files, 0 differ\n")


@pytest.mark.parametrize(
    ("path", "other"),
    [("file", {"content": "else"}), ("file", {"mode": 0o755}), ("link", {"target": "elsewhere"})],
    ids=["content", "mode", "target"],
)
def test_a_difference_is_told(make_image, compare, path, other):
    result = compare(make_image("first"), make_image("second", **other))
    assert result.returncode == 1
    assert result.stdout.splitlines()[0] == f"{path}: differs"
