# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files, in output/data/tensorboard."""

from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from llm_trainer.trackers.events import read_rows

Record = dict[str, Any]


class TensorboardTracker:
    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, job: Record) -> str:
        self.started = job["time"]
        self.writer = SummaryWriter(str(self.folder))
        return f"events in {self.folder}"

    def send(self, records: list[Record]) -> None:
        for row in read_rows(records, self.started):
            for name, value in row.values.items():
                self.writer.add_scalar(name, value, row.step, walltime=row.time)
        self.writer.flush()

    def upload(self, files: list[Path]) -> None:
        """Event files hold numbers only."""

    def upload_model(self, folder: Path) -> None:
        """Likewise."""

    def end(self, status: str, reason: str | None) -> None:
        self.writer.close()
