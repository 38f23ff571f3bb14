# SPDX-License-Identifier: Apache-2.0
"""A job's states and lines are shown as they come, and its end with the reason or the result."""

import time

import pytest
from botocore.exceptions import ClientError

from llm_trainer.aws import clients, watching
from llm_trainer.aws.watching import LOG_GROUP, JobLog, describe_end, describe_job, find_result, follow_job

STARTING = {"Status": "Starting", "StartTime": 1, "StatusMessage": "Preparing the instances for training"}
TRAINING = {"Status": "Training", "StartTime": 2, "StatusMessage": "Training image download completed."}
FAILED = {"Status": "Failed", "StartTime": 3, "StatusMessage": "Training job failed"}


@pytest.fixture
def write_log(aws, monkeypatch):
    """Writes lines to a stream of the job's log, as an instance does."""
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0)
    client = aws.client("logs")

    def write(stream, *lines):
        if not client.describe_log_groups(logGroupNamePrefix=LOG_GROUP)["logGroups"]:
            client.create_log_group(logGroupName=LOG_GROUP)
        names = client.describe_log_streams(logGroupName=LOG_GROUP)["logStreams"]
        if stream not in [each["logStreamName"] for each in names]:
            client.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
        now = int(time.time() * 1000)
        events = [{"timestamp": now, "message": line} for line in lines]
        client.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=events)

    return write


def test_lines_come_once(write_log):
    job_log = JobLog("job-1")
    assert list(job_log.read_new()) == []
    write_log("job-10/algo-1-1", "of another job")
    write_log("job-1/algo-1-1", "one", "two")
    assert list(job_log.read_new()) == ["one", "two"]
    write_log("job-1/algo-1-1", "three")
    assert list(job_log.read_new()) == ["three"]
    assert list(job_log.read_new()) == []


def test_lines_of_several_hosts_name_their_host_and_those_of_one_do_not(write_log):
    write_log("job-1/algo-1-1", "before the interruption")
    write_log("job-1/algo-1-2", "after it")
    assert list(JobLog("job-1").read_new()) == ["before the interruption", "after it"]
    write_log("job-1/algo-2-1", "beside it")
    assert "[algo-2] beside it" in list(JobLog("job-1").read_new())


def test_a_job_is_followed_to_its_end(aws, write_log, capsys):
    answers = [
        ("InProgress", [STARTING], ()),
        ("InProgress", [STARTING, TRAINING], ("train_loss=0.5; step=1", "\x1b]0;forged\x07")),
        ("Failed", [STARTING, TRAINING, FAILED], ("the last line",)),
    ]

    def describe(asked):
        assert asked == {"TrainingJobName": "job-1"}
        status, states, lines = answers.pop(0)
        if lines:
            write_log("job-1/algo-1-1", *lines)
        return {"TrainingJobName": "job-1", "TrainingJobStatus": status, "SecondaryStatusTransitions": states}

    aws.answers["DescribeTrainingJob"] = describe
    assert follow_job(describe_job("job-1"))["TrainingJobStatus"] == "Failed"
    assert capsys.readouterr().out.splitlines() == [
        "Starting: Preparing the instances for training",
        "Training: Training image download completed.",
        "train_loss=0.5; step=1",
        "\\x1b]0;forged\\x07",
        "Failed: Training job failed",
        "the last line",
    ]


def test_an_outage_is_told_once_and_outlasted(aws, write_log, monkeypatch, capsys):
    monkeypatch.setattr(clients, "ATTEMPTS", 1)
    job = {"TrainingJobName": "job-1", "TrainingJobStatus": "InProgress"}
    aws.answers["DescribeTrainingJob"] = lambda asked: job | {"TrainingJobStatus": "Completed"}
    write_log("job-1/algo-1-1", "a line")
    aws.refuse("DescribeLogStreams", "ThrottlingException", "Rate exceeded", times=2)
    assert follow_job(job)["TrainingJobStatus"] == "Completed"
    told, *lines = capsys.readouterr().out.splitlines()
    assert told.startswith("AWS does not answer now, and is asked again (An error occurred (ThrottlingException)")
    assert lines == ["a line"]
    aws.refuse("DescribeLogStreams", "ExpiredTokenException", "The security token is expired")
    with pytest.raises(ClientError, match="expired"):
        follow_job(job)


def test_the_end_of_a_job_in_words():
    job = {
        "TrainingJobStatus": "Completed",
        "SecondaryStatus": "Completed",
        "TrainingTimeInSeconds": 600,
        "BillableTimeInSeconds": 180,
        "FinalMetricDataList": [{"MetricName": "train_loss", "Value": 0.123456789, "Timestamp": 1}],
        "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/output/job-1/output/model"},
    }
    assert list(describe_end(job)) == [
        "Completed; 10 min of training; 3 min billed an instance",
        "Last metrics: train_loss=0.123457",
        "Result: s3://bucket/output/job-1/output/model",
    ]
    job = {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "FailureReason": "AlgorithmError: lora_r=0"}
    assert list(describe_end(job)) == ["Failed", "Reason: AlgorithmError: lora_r=0"]
    assert list(describe_end({"TrainingJobStatus": "Stopped", "SecondaryStatus": "MaxRuntimeExceeded"})) == [
        "Stopped (MaxRuntimeExceeded)"
    ]
    assert find_result({}) is None
