# SPDX-License-Identifier: Apache-2.0
"""The launcher's side of the reporter (reporter.py): starts it, and ends it within bounds."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import Settings
from llm_trainer.config.tracker_choice import choose_trackers, tracker_variables
from llm_trainer.job.inputs import Inputs
from llm_trainer.journal.journal import FILE_NAME
from llm_trainer.launcher.supervisor import end_processes
from llm_trainer.trackers.reporter import REPORT_SECONDS, find_patience


class ReporterProcess:
    """The reporter's process while the job's workers run, on the first training host; on the others nothing."""

    def __init__(
        self,
        environment: Environment,
        settings: Settings,
        inputs: Inputs,
        variables: Mapping[str, str],
        stop_file: Path,
    ) -> None:
        """`variables` are the workers' environment."""
        self.is_first_host = environment.node_rank == 0
        self.command = [
            sys.executable,
            "-m",
            "llm_trainer.trackers.reporter",
            str(environment.output_dir / "data" / FILE_NAME),
        ]
        self.command += [f"--model-dir={inputs.model_dir}"]
        if trackers := choose_trackers(settings, variables):
            self.command += [f"--trackers={','.join(trackers)}"]
        if settings.training.use_checkpoints:
            self.command += [f"--checkpoint-dir={inputs.checkpoint_dir}"]
        if settings.tracking.track_model:
            self.command += ["--track-model"]
        self.variables = {**variables, **tracker_variables(settings, variables), "OMP_NUM_THREADS": "1"}
        self.model_dir = inputs.model_dir if settings.tracking.track_model else None
        self.stop_file = stop_file

    def __enter__(self) -> "ReporterProcess":
        if self.is_first_host:
            # A session of its own: a terminal's Ctrl-C is not for it. The pipe tells it when the job is over.
            self.child = subprocess.Popen(
                self.command, env=self.variables, stdin=subprocess.PIPE, start_new_session=True
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.is_first_host:
            return
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            self.child.wait(REPORT_SECONDS + find_patience(self.stop_file, self.model_dir))
        except subprocess.TimeoutExpired:
            print("Warning: the report and the trackers took too long: they are left as they are.", flush=True)
        end_processes(self.child)
