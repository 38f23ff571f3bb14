# SPDX-License-Identifier: Apache-2.0
from llm_trainer.trackers import tensorboard
from llm_trainer.trackers.tensorboard import TensorboardTracker


class FakeWriter:
    """Keeps what a SummaryWriter would write."""

    def __init__(self, folder):
        self.folder, self.scalars, self.is_closed = folder, [], False

    def add_scalar(self, name, value, step, walltime):
        self.scalars.append((name, value, step, walltime))

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


def test_numbers_are_written_by_step_or_by_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "SummaryWriter", FakeWriter)
    tracker = TensorboardTracker(tmp_path)
    assert tracker.begin({"time": 1000.0, "kind": "job"}) == f"events in {tmp_path}"
    tracker.send(
        [
            {"time": 1010.0, "kind": "metrics", "step": 3, "values": {"train_loss": 2.5}},
            {"time": 1020.0, "kind": "system", "values": {"host/a/cpu_percent": 40}},
        ]
    )
    tracker.upload([])
    tracker.upload_model(tmp_path)
    tracker.end("done", None)
    assert tracker.writer.scalars == [("train_loss", 2.5, 3, 1010.0), ("host/a/cpu_percent", 40.0, 20, 1020.0)]
    assert tracker.writer.is_closed
