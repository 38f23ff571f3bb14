# SPDX-License-Identifier: Apache-2.0
"""The command line: `llm-trainer train`, which is what SageMaker starts, and the commands around it."""

import os
import shutil
import sys
from collections.abc import Callable

from llm_trainer import __version__

USAGE = """usage: llm-trainer train [--SETTING VALUE ...]
       llm-trainer train --help
       llm-trainer validate [--SETTING VALUE ...] [--json]
       llm-trainer plan [--SETTING VALUE ...] [--json]
       llm-trainer doctor [--SETTING VALUE ...]
       llm-trainer merge --adapter FOLDER --output FOLDER [--base FOLDER_OR_HUB_ID] [...]
       llm-trainer merge --help
       llm-trainer metrics [--json]
       llm-trainer --version

train fine-tunes the model and data of the SageMaker tree under /opt/ml (or SAGEMAKER_BASE_DIR).
validate tells, without GPU or weights, whether that job would start, and what it would train on.
plan tells how its model would be loaded, and what that takes on a GPU, from the model's config alone.
doctor tells whether such a job would run well on this machine.
merge adds an adapter to its base, from disk to disk, and goes on where an earlier merge ended.
metrics prints the metric definitions with which SageMaker reads the log.
"""


def main() -> int:
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name == "--version":
        print(__version__)
        return 0
    command = find_command(name)
    wants_help = bool({"--help", "-h"} & {name, *arguments})
    if name == "train" and wants_help:
        from llm_trainer.cli.settings_docs import as_help

        print(as_help())
        return 0
    if command is not None and (name == "merge" or not wants_help):  # which has a help of its own
        return command(arguments)
    if command is None and os.getpid() == 1 and shutil.which(name):
        # A container's own command, as other images run it: SDK 3 cleans up after its local mode with
        # `docker run IMAGE chmod -R 777 FOLDER`, and for all but root fails where that does.
        os.execvp(name, sys.argv[1:])
    print(USAGE, end="", file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


def find_command(name: str) -> Callable[[list[str]], int] | None:
    """The function of a command, imported alone: others' imports would take seconds."""
    match name:
        case "train":
            from llm_trainer.launcher.launch import launch as command
        case "validate":
            from llm_trainer.cli.validate import validate as command
        case "plan":
            from llm_trainer.cli.plan import plan as command
        case "doctor":
            from llm_trainer.cli.doctor import diagnose as command
        case "merge":
            from llm_trainer.cli.merge import run as command
        case "metrics":
            from llm_trainer.journal.metric_definitions import print_definitions as command
        case _:
            return None
    return command
