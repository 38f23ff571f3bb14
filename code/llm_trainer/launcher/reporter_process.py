# SPDX-License-Identifier: Apache-2.0
"""The launcher's side of the reporter: start its process with the workers, and end it within bounds."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from llm_trainer.common import log
from llm_trainer.common.processes import PYTHON, SAFE_PATH, bind_command
from llm_trainer.launcher.supervisor import end_processes
from llm_trainer.trackers.reporter import REPORT_SECONDS, find_patience


@dataclass(frozen=True)
class ReporterOptions:
    """Options of the reporter: the journal that it follows, and where it sends what it reads."""

    journal: Path
    model_dir: Path
    checkpoint_dir: Path | None  # None where the job keeps no checkpoints
    trackers: Sequence[str]
    tracks_model: bool

    def build_command(self) -> list[str]:
        """Return the command of the reporter's process."""
        command = [*PYTHON, "-m", "llm_trainer.trackers.reporter", str(self.journal)]
        command += [f"--model-dir={self.model_dir}"]
        if self.trackers:
            command += [f"--trackers={','.join(self.trackers)}"]
        if self.checkpoint_dir:
            command += [f"--checkpoint-dir={self.checkpoint_dir}"]
        return [*command, *["--track-model"] * self.tracks_model]


@dataclass
class ReporterProcess:
    """The reporter's process, which runs for as long as the block."""

    options: ReporterOptions
    variables: Mapping[str, str]  # its environment
    stop_file: Path
    child: "subprocess.Popen[bytes]" = field(init=False)

    def __enter__(self) -> Self:
        """Start the process in a session of its own: a terminal's Ctrl-C is not for it."""
        command, variables = self.options.build_command(), {**self.variables, **SAFE_PATH, "OMP_NUM_THREADS": "1"}
        # The pipe tells it when the job is over.
        self.child = subprocess.Popen(
            bind_command(command), env=variables, stdin=subprocess.PIPE, start_new_session=True
        )
        return self

    def __exit__(self, *exception: object) -> None:
        """Close its standard input, wait for what is left to send, and end it where that takes too long."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        model_dir = self.options.model_dir if self.options.tracks_model else None
        try:
            self.child.wait(REPORT_SECONDS + find_patience(self.stop_file, model_dir))
        except subprocess.TimeoutExpired:
            log.warning("the report and the trackers took too long: they are left as they are.")
        end_processes(self.child)
