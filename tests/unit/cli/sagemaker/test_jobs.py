# SPDX-License-Identifier: Apache-2.0
"""The commands about jobs that were submitted."""

import pytest

from llm_trainer.aws import watching
from llm_trainer.cli.main import run_command

PLACE = "s3://bucket/output/job-1/output"
DESCRIPTION = {
    "TrainingJobName": "job-1",
    "TrainingJobStatus": "Completed",
    "SecondaryStatus": "Completed",
    "OutputDataConfig": {"S3OutputPath": "s3://bucket/output"},
    "ModelArtifacts": {"S3ModelArtifacts": f"{PLACE}/model"},
}


@pytest.fixture
def job(aws, monkeypatch):
    """A description, which a test may change."""
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0)
    aws.furnish()
    description = dict(DESCRIPTION)
    aws.answers["DescribeTrainingJob"] = lambda asked: description
    return description


def test_watch_ends_with_the_result(job, capsys):
    assert run_command(["watch", "job-1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["Completed", f"Result: {PLACE}/model", "llm-trainer fetch job-1"]


def test_watch_ends_with_the_reason_of_a_failure(job, capsys):
    job |= {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "FailureReason": "AlgorithmError: no room"}
    assert run_command(["watch", "job-1"]) == 1
    assert "Reason: AlgorithmError: no room" in capsys.readouterr().out


def test_who_stops_to_watch_is_told_that_the_job_goes_on(job, monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_trainer.cli.sagemaker.jobs.follow_job", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_command(["watch", "job-1"])
    assert "The job goes on. `llm-trainer stop job-1` ends it" in capsys.readouterr().out


def test_credentials_that_expire_end_the_watch_and_not_the_job(aws, job, capsys):
    aws.refuse("DescribeLogStreams", "ExpiredTokenException", "The security token included in the request is expired")
    assert run_command(["watch", "job-1"]) == 1
    printed = capsys.readouterr()
    assert "The job goes on." in printed.out and "The AWS credentials have expired" in printed.err


def test_fetch_names_the_report(aws, job, tmp_path, capsys):
    aws.put_files(PLACE, {"data/report.html": "<html>"})
    assert run_command(["fetch", "job-1", "--output", str(tmp_path / "here")]) == 0
    assert f"Report: {tmp_path}/here/data/report.html" in capsys.readouterr().out
    job["TrainingJobStatus"] = "InProgress"
    assert run_command(["fetch", "job-1"]) == 1
    assert "job-1 is InProgress: its results come when it ends" in capsys.readouterr().err


def test_stop(aws, job, capsys):
    aws.answers["StopTrainingJob"] = lambda asked: {}
    assert run_command(["stop", "job-1"]) == 0
    assert aws.list_arguments("StopTrainingJob") == [{"TrainingJobName": "job-1"}]
    assert "it saves, and exports the adapter so far" in capsys.readouterr().out


def test_list(aws, capsys):
    summary = {"TrainingJobName": "job-1", "TrainingJobArn": "arn", "CreationTime": 0, "TrainingJobStatus": "Failed"}
    endpoint = {"EndpointName": "served", "EndpointArn": "arn", "CreationTime": 0, "EndpointStatus": "InService"}
    aws.answers["ListTrainingJobs"] = lambda asked: {"TrainingJobSummaries": [summary]}
    aws.answers["ListEndpoints"] = lambda asked: {"Endpoints": [endpoint | {"LastModifiedTime": 0}]}
    assert run_command(["list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["job-1", "Failed", "1970-01-01", "00:00"] in lines
    assert ["served", "InService", "1970-01-01", "00:00"] in lines


def test_a_job_that_is_not_there(aws, capsys):
    assert run_command(["watch", "nothing"]) == 1
    assert "sagemaker:DescribeTrainingJob found nothing (Could not find training job" in capsys.readouterr().err
