# SPDX-License-Identifier: Apache-2.0
"""The options that name folders where there is no /opt/ml, as on a cluster whose nodes share a file system.

They become environment variables, which every process of the job inherits.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from llm_trainer.config.environment import BASE_DIR, DATA_DIR, DEFAULT_BASE_DIR

# Any of these means that somebody has laid out the tree. HyperPod's agent leaves a file of its own beside them.
INPUTS = ("data", "config/resourceconfig.json", "config/hyperparameters.json")


def take_folders(words: Sequence[str]) -> list[str]:
    """Return the words without those that name folders, after setting their environment variables."""
    data_dir, rest = take_option(words, "data-dir")
    if data_dir:
        os.environ[DATA_DIR] = os.path.abspath(data_dir)
    if BASE_DIR in os.environ or any(Path(DEFAULT_BASE_DIR, "input", part).exists() for part in INPUTS):
        return rest  # output_dir is the setting then
    output_dir, rest = take_option(rest, "output-dir")
    if output_dir:
        os.environ[BASE_DIR] = os.path.abspath(output_dir)
    return rest


def take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return an option's value, None where it is not there or has none, and the other words."""
    spellings = (f"--{name}", f"--{name.replace('-', '_')}")
    for place, word in enumerate(words):
        key, separator, value = word.partition("=")
        if key not in spellings:
            continue
        if separator:
            return value, [*words[:place], *words[place + 1 :]]
        if place + 1 < len(words) and not words[place + 1].startswith("--"):
            return words[place + 1], [*words[:place], *words[place + 2 :]]
    return None, [*words]
