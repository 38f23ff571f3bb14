# SPDX-License-Identifier: Apache-2.0
"""The options that name folders where there is no /opt/ml, as on a cluster whose nodes share a file system.

They become environment variables, which every process of the job inherits.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.config.environment import BASE_DIR, DATA_DIR, DEFAULT_BASE_DIR
from llm_trainer.config.sections import ADDRESS

# Any of these means that somebody has laid out the tree. HyperPod's agent leaves a file of its own beside them.
INPUTS = ("data", "config/resourceconfig.json", "config/hyperparameters.json")


def take_folders(words: Sequence[str]) -> list[str]:
    """Return the words without those that name folders, after setting their environment variables.

    Raises UserError for an address in place of a folder, and for data in a folder that is not there.
    """
    data_dir, rest = take_option(words, "data-dir")
    if data_dir:
        check_folder("data-dir", data_dir)
        if not os.path.isdir(data_dir):
            raise UserError(f"--data-dir={cut_quote(data_dir)} is no folder on this machine: mount or make it first.")
        os.environ[DATA_DIR] = os.path.abspath(data_dir)
    if BASE_DIR in os.environ or any(Path(DEFAULT_BASE_DIR, "input", part).exists() for part in INPUTS):
        return rest  # output_dir is the setting then
    output_dir, rest = take_option(rest, "output-dir")
    if output_dir:
        check_folder("output-dir", output_dir)
        os.environ[BASE_DIR] = os.path.abspath(output_dir)
    return rest


def check_folder(name: str, value: str) -> None:
    """Raise UserError where an option that names a folder has an address, such as s3://."""
    if ADDRESS.match(value):
        raise UserError(
            f"--{name}={cut_quote(value)} is an address, and files are read and written in folders: mount it "
            "(Mountpoint for Amazon S3) or copy it (aws s3 sync), and give the folder."
        )


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
