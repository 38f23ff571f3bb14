# SPDX-License-Identifier: Apache-2.0
"""The launcher's side of the reporter: start its process with the workers, and end it within bounds."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from llm_trainer.common import log
from llm_trainer.common.processes import PYTHON, SAFE_PATH, bind_command
from llm_trainer.launcher.supervisor import end_processes
from llm_trainer.trackers.reporter import REPORT_SECONDS, find_patience

POLL_SECONDS = 0.2


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
    is_ending: threading.Event = field(default_factory=threading.Event)
    is_late: bool = False

    def __enter__(self) -> Self:
        """Start the process, and a thread that tells when it dies."""
        self.child = self.start(self.options)
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Have the process write the report and send what is left, and end it where that takes too long.

        Where it was killed before, another one writes the report. Trackers would get everything a second time from it.
        """
        self.is_ending.set()
        self.watcher.join()
        self.finish()
        if self.child.returncode and not self.is_late:
            self.child = self.start(replace(self.options, trackers=()))
            self.finish()

    def start(self, options: ReporterOptions) -> "subprocess.Popen[bytes]":
        """Start a reporter in a session of its own: a terminal's Ctrl-C is not for it."""
        variables = {**self.variables, **SAFE_PATH, "OMP_NUM_THREADS": "1"}
        command = bind_command(options.build_command())
        # The pipe tells it when the job is over.
        return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self) -> None:
        """Warn where the process ends before the job does."""
        while not self.is_ending.wait(POLL_SECONDS):
            if self.child.poll():
                names = self.options.trackers
                lost = f"{', '.join(names)} get no more, and the" if names else "the"
                log.warning(
                    f"the process that reports has died (exit code {self.child.returncode}; -9 is what a host "
                    f"that runs out of memory gives): {lost} report is written at the end of the job."
                )
                return

    def finish(self) -> None:
        """Close the process's standard input, wait for its end, and kill it where that takes too long."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        model_dir = self.options.model_dir if self.options.tracks_model else None
        started = time.monotonic()
        while self.child.poll() is None:
            # Asked again and again, because a stop leaves less time.
            if time.monotonic() - started > REPORT_SECONDS + find_patience(self.stop_file, model_dir):
                log.warning("the report and the trackers took too long: they are left as they are.")
                self.is_late = True
                break
            time.sleep(POLL_SECONDS)
        end_processes(self.child)
