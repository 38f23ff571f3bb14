# SPDX-License-Identifier: Apache-2.0
"""The version stands in one place, from which the package, the image and the command line take it."""

import re
import subprocess
import tomllib

from llm_trainer import __version__
from support.measures import ROOT


def test_the_package_takes_its_version_from_the_code():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llm_trainer.__version__"}


def test_the_image_takes_its_version_from_the_code():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(r"VERSION=\$\$\((sed .+?\.py)\)", makefile)
    assert subprocess.check_output(["bash", "-c", command], cwd=ROOT, text=True).strip() == __version__


def test_the_changes_of_the_version_are_told():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert __version__ in headings
