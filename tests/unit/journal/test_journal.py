# SPDX-License-Identifier: Apache-2.0
"""What is written is read again, whole records only, and a disk that is full costs records but no job."""

import json
import os

import pytest

from llm_trainer.journal.journal import Journal, read_records


@pytest.fixture
def file(tmp_path):
    return tmp_path / "output/data/metrics.jsonl"


def read(file, offset=0):
    return [record for record, _ in read_records(file, offset)]


def test_records_are_read_as_they_were_written_without_secrets(file):
    Journal(file).write("job", name="trial", settings={"mlflow_uri": "https://me:pass@host"}, newer=[1])
    Journal(file).write("phase", name="data", seconds=1.5, host="algo-1")
    job, phase = read(file)
    assert {**job, "time": 0} == {
        "time": 0,
        "kind": "job",
        "name": "trial",
        "settings": {"mlflow_uri": "https://***@host"},
        "newer": [1],
    }
    assert (phase["name"], phase["seconds"], phase["host"]) == ("data", 1.5, "algo-1")


def test_reading_goes_on_at_an_offset(file):
    journal = Journal(file)
    journal.write("metrics", step=1)
    ((_, offset),) = read_records(file)
    assert offset == os.stat(file).st_size
    journal.write("metrics", step=2)
    assert [record["step"] for record in read(file, offset)] == [2]


def test_what_is_unfinished_cut_or_of_an_unknown_kind_is_passed_over(file):
    file.parent.mkdir(parents=True)
    lines = ['{"time": 1, "ki', '{"time": 2, "kind": "of a newer version"}', '{"time": 3, "kind": "metrics"}']
    file.write_text("\n".join(lines) + '\n{"time": 4, "kind": "met')
    assert [record["time"] for record in read(file)] == [3]
    with file.open("a") as stream:
        stream.write('rics"}\n')
    assert [record["time"] for record in read(file)] == [3, 4]


def test_a_journal_from_before_the_first_schema_version_is_readable(file):
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"time": 1, "kind": "job", "name": "old"}) + "\n")
    (job,) = read(file)
    assert job.get("schema_version") is None


def test_there_is_no_journal_where_none_is_wanted_or_written(tmp_path, file):
    Journal(None).write("metrics", step=1)
    Journal(None).clear()
    Journal(file).clear()
    assert read(file) == []
    assert not list(tmp_path.iterdir())


def test_an_earlier_journal_is_cleared(file):
    Journal(file).write("metrics", step=1)
    Journal(file).clear()
    assert not file.exists()


def test_a_journal_that_cannot_be_written_is_told_of_once(tmp_path, capsys):
    (tmp_path / "output").write_text("a file where the folder belongs")
    journal = Journal(tmp_path / "output/metrics.jsonl")
    for step in range(3):
        journal.write("metrics", step=step)
    assert capsys.readouterr().err.count("cannot be written") == 1
