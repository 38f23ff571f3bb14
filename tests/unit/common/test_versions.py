# SPDX-License-Identifier: Apache-2.0
import platform
from importlib.metadata import version

from llm_trainer.common import versions
from llm_trainer.common.versions import PACKAGES, read_versions


def test_the_versions_are_those_installed():
    found = read_versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert found.keys() == {"python", *PACKAGES}


def test_a_package_without_metadata_fails_nothing(monkeypatch):
    monkeypatch.setattr(versions, "PACKAGES", ("torch", "no-such-package"))
    assert read_versions() | {"python": ""} == {"python": "", "torch": version("torch"), "no-such-package": "unknown"}
