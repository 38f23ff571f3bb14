# SPDX-License-Identifier: Apache-2.0
"""Versions of the packages that decide a result. They are read from metadata, so that nothing is imported."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


UNKNOWN = "unknown"  # what a package without metadata has, be it missing or copied without


def read_versions() -> dict[str, str]:
    """Return the versions of Python and of each package, by name."""
    return {"python": platform.python_version(), **{name: read_version(name) for name in PACKAGES}}


def read_version(name: str) -> str:
    """Return the version of a package by its metadata, or UNKNOWN where it has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN
