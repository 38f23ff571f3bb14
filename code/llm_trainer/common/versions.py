# SPDX-License-Identifier: Apache-2.0
"""Versions of the packages that decide a result. They are read from metadata, so that nothing is imported."""

import platform
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def read_versions() -> dict[str, str]:
    """Return the versions of Python and of each package, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
