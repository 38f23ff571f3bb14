# SPDX-License-Identifier: Apache-2.0
"""The process in which `submit` checks the tree of a job. torch is imported once for `validate` and `plan`.

    python -m llm_trainer.cli.tree_checks validate,plan TYPE=COUNT,... [OPTION OF PLAN ...]

The instances are those that `plan` is asked about. It prints what each of the two commands would print with --json, by
the command's name.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace

from llm_trainer.cli.commands import parse_command, read_plan_options
from llm_trainer.cli.plan import examine_model
from llm_trainer.cli.validate import examine_job
from llm_trainer.cli.validation import show_json
from llm_trainer.common import log
from llm_trainer.common.library_noise import silence_libraries
from llm_trainer.launcher.stop_signal import end_on_stops


def main(words: Sequence[str]) -> None:
    """Print what the commands tell of the job of this process's tree.

    The first word names them, and the second one the instances that the job may run on.
    """
    end_on_stops()
    log.escape_unprintable()
    silence_libraries()
    names, instances, *plan_words = words
    places = tuple((name, int(count)) for name, _, count in (each.partition("=") for each in instances.split(",")))
    options = replace(read_plan_options(parse_command(["plan", *plan_words])), places=places)
    commands = {"validate": lambda: examine_job([], in_colour=False), "plan": lambda: examine_model([], options)}
    with contextlib.redirect_stdout(sys.stderr):  # a library may print, too, and must not break the JSON
        found = {name: commands[name]().describe() for name in names.split(",")}
    print(show_json(found))


if __name__ == "__main__":
    main(sys.argv[1:])
