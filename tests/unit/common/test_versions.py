# SPDX-License-Identifier: Apache-2.0
import platform
from importlib.metadata import version

from llm_trainer.common.versions import PACKAGES, read_versions


def test_the_versions_are_those_installed():
    versions = read_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == version("torch")
    assert versions.keys() == {"python", *PACKAGES}
