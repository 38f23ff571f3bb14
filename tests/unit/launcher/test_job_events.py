# SPDX-License-Identifier: Apache-2.0
"""What the launcher writes to the journal, and on hosts but the first hands over instead."""

import json
from dataclasses import replace

import pytest

from llm_trainer.common.errors import Failure
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings, describe_settings
from llm_trainer.journal.journal import Journal, read_records
from llm_trainer.journal.records import SCHEMA_VERSION
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.hosts.cluster import ClusterLink
from llm_trainer.launcher.job_events import JobDescription, JobEventWriter
from llm_trainer.launcher.supervisor import Attempts, Verdict
from support.journals import list_fields

BROKE = Failure("Rank 0 broke.", "fault", 1.0)


@pytest.fixture
def opt_ml(tmp_path, monkeypatch):
    """An /opt/ml of two hosts."""
    config = tmp_path / "input/config"
    config.mkdir(parents=True)
    resources = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"], "current_instance_type": "ml.p5.48xlarge"}
    (config / "resourceconfig.json").write_text(json.dumps(resources))
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("TRAINING_JOB_NAME", "tune-1")
    monkeypatch.setenv("TRAINING_JOB_ARN", "arn:aws:sagemaker:eu-west-1:123456789012:training-job/tune-1")
    monkeypatch.setenv("LLM_TRAINER_REVISION", "4fb1a2")
    monkeypatch.setenv("LLM_TRAINER_IMAGE", "trainer@sha256:12ab")
    return tmp_path


def build_writer(environment=None, settings=None):
    environment = environment or read_environment()
    link = ClusterLink(environment.hosts, environment.current_host, b"key")
    redacted = describe_settings(settings or Settings())
    return JobEventWriter(environment, link, JobDescription(1000.5, 4, redacted))


def attempt(number, cause=None, members=("algo-1", "algo-2")):
    return Attempts(0, number, members, cause)


def timeline(started):
    return Timeline(started, Journal(None), "algo-1")


def records(opt_ml):
    return [record for record, _ in read_records(opt_ml / "output/data/metrics.jsonl")]


def test_a_job_is_told_at_every_attempt_without_its_secrets(opt_ml):
    settings = Settings(model_id="org/model", token="hf_secret", nproc_per_node=4, mlflow_uri="https://me:pass@host/")
    events = build_writer(replace(read_environment(), other_hosts=("algo-3",)), settings)
    events.write_attempt(attempt(1), timeline(1000.5), goes_on=False)
    events.write_attempt(attempt(2, BROKE, ["algo-1"]), timeline(1000.5), goes_on=True)
    job, event, again = records(opt_ml)
    assert (job["name"], job["arn"][:12]) == ("tune-1", "arn:aws:sage")
    assert (job["attempt"], again["attempt"]) == (1, 2)
    assert job.keys() == list_fields("job")
    assert job["schema_version"] == SCHEMA_VERSION
    assert (job["started"], job["billed_hosts"]) == (again["started"], again["billed_hosts"]) == (1000.5, 3)
    assert (job["hosts"], job["world_size"]) == (["algo-1", "algo-2"], 8)
    assert (again["hosts"], again["world_size"]) == (["algo-1"], 4)
    assert job["settings"]["model_id"] == "org/model"
    assert "hf_secret" not in str(job)
    assert "pass" not in job["settings"]["mlflow_uri"]
    environment = job["environment"]
    assert (environment["revision"], environment["image"]) == ("4fb1a2", "trainer@sha256:12ab")
    assert environment["instance_type"] == "ml.p5.48xlarge"
    assert environment["packages"]["torch"]
    assert event["text"] == "Rank 0 broke. Attempt 2: the workers start again from the newest checkpoint."


@pytest.mark.parametrize(("goes_on", "attempts"), [(False, [1]), (True, [1, 1])])
def test_an_earlier_jobs_journal_stays_for_a_job_that_goes_on_with_it(opt_ml, goes_on, attempts):
    for _ in range(2):
        build_writer().write_attempt(attempt(1), timeline(1000.0), goes_on=goes_on)
    assert [record["attempt"] for record in records(opt_ml)] == attempts


def test_the_next_first_hosts_journal_begins_with_the_job_and_tells_of_the_lost_one(opt_ml):
    build_writer().write_attempt(attempt(2, BROKE), timeline(1000.0), goes_on=False)
    job, event = records(opt_ml)
    assert (job["kind"], job["attempt"], event["text"][:13]) == ("job", 2, "Rank 0 broke.")


def test_what_a_host_measures_before_the_first_attempt_comes_after_the_jobs_own_record(opt_ml):
    writer = build_writer()
    writer.write("system", host="algo-1", values={"early": 1})
    assert not records(opt_ml)
    writer.write_attempt(attempt(1), timeline(1000.5), goes_on=False)
    writer.write("system", host="algo-1", values={"late": 2})
    job, *_, early, late = records(opt_ml)
    assert (job["kind"], early["values"], late["values"]) == ("job", {"early": 1}, {"late": 2})
    assert early["time"] <= job["time"]


def test_phases_stand_at_the_time_when_they_ended(opt_ml):
    begun = timeline(1000.0)
    begun.seconds = {"check": 1.5, "meeting": 2.0}
    build_writer().write_attempt(attempt(1), begun, goes_on=False)
    _, *phases = records(opt_ml)
    told = [(record["name"], record["time"], record["seconds"], record["host"]) for record in phases]
    assert told == [("check", 1001.5, 1.5, "algo-1"), ("meeting", 1003.5, 2.0, "algo-1")]


@pytest.mark.parametrize(
    ("verdict", "manifest", "status"),
    [
        (Verdict("done"), {"stopped": False}, "done"),
        (Verdict("done"), {"stopped": True}, "stopped"),
        (Verdict("done"), None, "done"),
        (Verdict("stopped"), {"stopped": False}, "stopped"),
        (Verdict("failed", Failure("Rank 0 broke.", "fault", 1.0)), {"stopped": True}, "failed"),
    ],
)
def test_the_end_says_how_it_ended_and_why(opt_ml, verdict, manifest, status):
    (opt_ml / "model").mkdir()
    if manifest:
        (opt_ml / "model/training_manifest.json").write_text(json.dumps(manifest))
    build_writer().write_end(verdict, opt_ml / "model")
    (end,) = records(opt_ml)
    reason = verdict.failure and verdict.failure.reason
    assert (end["kind"], end["status"], end["reason"]) == ("end", status, reason)


def test_other_hosts_hand_over_what_they_measure_and_keep_no_journal(opt_ml):
    resources = {"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}
    (opt_ml / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    events = build_writer()
    events.write_attempt(attempt(1), timeline(1000.0), goes_on=False)
    events.write_attempt(attempt(2, BROKE), timeline(1000.0), goes_on=False)
    events.write("system", host="algo-2", gpus={"power_watts": [1.5]})
    events.write_end(Verdict("done"), opt_ml / "model")
    assert [(record["kind"], record["gpus"]) for record in events.link.records] == [("system", {"power_watts": [1.5]})]
    assert not (opt_ml / "output").exists()


def test_without_a_place_for_the_journal_the_job_goes_on(opt_ml, capsys):
    (opt_ml / "output").write_text("a file where the folder belongs")
    events = build_writer()
    events.write_attempt(attempt(1), timeline(1000.0), goes_on=False)
    events.write_end(Verdict("done"), opt_ml / "model")
    assert "metrics.jsonl cannot be written" in capsys.readouterr().err
