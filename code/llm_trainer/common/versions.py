# SPDX-License-Identifier: Apache-2.0
"""What of other people's software makes a model, by the metadata of what is installed: nothing is imported."""

import platform
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def read_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
