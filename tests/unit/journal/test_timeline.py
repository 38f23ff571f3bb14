# SPDX-License-Identifier: Apache-2.0
import time

import pytest

from llm_trainer.journal.journal import Journal, read_records
from llm_trainer.journal.timeline import Timeline


def test_phases_follow_each_other_without_a_gap(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "metrics.jsonl")
    timeline = Timeline(1000.0, journal, "algo-1")
    for now, phase in [(1002.5, "check"), (1010.0, "data")]:
        monkeypatch.setattr(time, "time", lambda now=now: now)
        timeline.mark(phase)
    assert timeline.seconds == {"check": 2.5, "data": 7.5}
    assert str(timeline) == "10.0 s after the start: check 2.5 s, data 7.5 s"
    records = [record for record, _ in read_records(journal.file)]
    assert [(record["name"], record["seconds"], record["host"]) for record in records] == [
        ("check", 2.5, "algo-1"),
        ("data", 7.5, "algo-1"),
    ]


def test_a_workers_timeline_goes_on_where_the_launchers_ended(monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_STARTED", "1000.0")
    monkeypatch.setenv("LLM_TRAINER_PHASES", '{"check": 2.5}')
    timeline = Timeline.continue_from_launcher(Journal(None), "algo-1")
    monkeypatch.setattr(time, "time", lambda: 1004.0)
    timeline.mark("launch")
    assert timeline.seconds == {"check": 2.5, "launch": pytest.approx(1.5)}
