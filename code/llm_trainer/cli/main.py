# SPDX-License-Identifier: Apache-2.0
"""The entry point `llm-trainer`: finds the command, runs it, and returns the exit code of the process."""

import os
import shutil
import sys
from collections.abc import Sequence

from llm_trainer.cli.commands import build_parser, list_commands, parse_command
from llm_trainer.common import log
from llm_trainer.config.placement import put_away
from llm_trainer.launcher.stop_signal import end_on_stops, note_early_stops

USAGE_ERROR = 2  # argparse's code for words that it does not understand
CLOSED_PIPE = 141  # 128 + SIGPIPE: the code of a program that writes to a reader who has left


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, by default the one of the process, and return the exit code.

    Raises SystemExit after --help and --version, and where an argument is wrong, as argparse does. A stop signal raises
    it too, except from `train`, which obeys a stop in its own way.
    """
    if words is None:
        note_early_stops()
        leave_working_folder()
        log.guard_output()
        words = sys.argv[1:]
        if words[:1] != ["train"]:
            end_on_stops()
    log.escape_unprintable()
    put_away(os.environ)
    try:
        try:
            return run_command(words)
        finally:
            sys.stdout.flush()  # Python itself would do it after this function, where nothing can catch an error
    except BrokenPipeError:
        # The reader, such as `head`, has left. Python's last flush must not meet the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def leave_working_folder() -> None:
    """Import nothing more from the working folder, which an empty part of PYTHONPATH means, nor from relative parts."""
    for part in os.environ.get("PYTHONPATH", "/").split(os.pathsep):
        if not os.path.isabs(part):
            sys.path[:] = [place for place in sys.path if place != os.path.abspath(part)]


def run_command(words: Sequence[str]) -> int:
    """Run the command that the words name, and return its exit code."""
    if not words:
        build_parser().print_help(sys.stderr)
        return USAGE_ERROR
    name = words[0]
    if name.startswith("-") or name in list_commands():
        asked = parse_command(words)
        exit_code: int = asked.run(asked)
        return exit_code
    if os.getpid() == 1 and shutil.which(name):
        # A container's own command, as other images run it: SDK 3 cleans up after its local mode with
        # `docker run IMAGE chmod -R 777 FOLDER`, and for all but root fails where that does.
        os.execvp(name, list(words))
    print(f"llm-trainer: {name!r} is not a command: {suggest_command(name)}\n", file=sys.stderr)
    build_parser().print_help(sys.stderr)
    return USAGE_ERROR


def suggest_command(name: str) -> str:
    """Return the end of a sentence about a word that is no command: the command that was probably meant."""
    import difflib  # only a mistake needs it

    nearest = difflib.get_close_matches(name, list_commands(), n=1, cutoff=0.5)
    return f"the nearest is {nearest[0]!r}." if nearest else f"the commands are {', '.join(list_commands())}."
