# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, in output/data/tensorboard."""

from collections.abc import Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from llm_trainer.journal.records import EndStatus, JobRecord, Record
from llm_trainer.trackers.events import read_rows


class TensorboardTracker:
    """Event files of the job's numbers."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, job: JobRecord) -> str:
        """Open an event file. Return where it is."""
        self.started = job["time"]
        self.writer = SummaryWriter(str(self.folder))
        return f"events in {self.folder}"

    def send(self, records: Sequence[Record]) -> None:
        """Write the numbers in the records."""
        for row in read_rows(records, self.started):
            for name, value in row.values.items():
                self.writer.add_scalar(name, value, row.step, walltime=row.time)
        self.writer.flush()

    def upload(self, files: list[Path]) -> None:
        """Do nothing: event files hold numbers only."""

    def upload_model(self, folder: Path) -> None:
        """Do nothing: event files hold numbers only."""

    def end(self, status: EndStatus, reason: str | None) -> None:
        """Close the event file."""
        self.writer.close()
