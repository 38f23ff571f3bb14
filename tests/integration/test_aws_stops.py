# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in the commands that talk to SageMaker: one sentence, exit code 130, nothing half done, and no orphan.

Each command is a process, and AWS is moto's server.
"""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support.aws_server import FINISHED_JOB, RESULT, AwsServer, start_server, write_rows
from support.sagemaker_tree import LLM_TRAINER
from support.waiting import wait_until

OPTIONS = ["--image", "sagemaker-llm-trainer:cuda", "--role", "Trainer", "--output", "s3://bucket/output"]
JOB = ["submit", *OPTIONS, "--instance_type", "ml.g6.2xlarge", "--name", "job-1"]
RUNNING = {"TrainingJobName": "job-1", "TrainingJobStatus": "InProgress"}
PART_BYTES = 8 << 20  # boto3 uploads larger files in parts


@dataclass
class Command:
    """A command of `llm-trainer` in a process group of its own, as a shell starts it."""

    process: subprocess.Popen
    scratch: Path

    def list_processes(self):
        """The processes that the command has started and that are still there."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def await_that(self, condition):
        """Return when the condition holds, which it has to before the command ends."""
        wait_until(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()

    def interrupt(self, release=None):
        """Press Ctrl-C, let AWS answer what it holds back, and return what the command has printed."""
        started = self.list_processes()
        os.killpg(self.process.pid, signal.SIGINT)
        if release:
            release.set()
        printed = "".join(self.process.communicate())
        assert self.process.returncode == 130, printed
        assert "Traceback" not in printed
        assert [process for process in started if process.is_running()] == []
        assert [*self.scratch.glob("llm-trainer-*-*")] == [], "scratch folders are left"
        return printed.splitlines()


@pytest.fixture
def aws():
    for server in start_server():
        server.furnish()
        yield server
        for event in server.held.values():
            event.set()


@pytest.fixture
def begin(aws: AwsServer, tmp_path):
    """Begins commands, and ends what a failed test leaves running."""
    commands = []

    def begin_command(*words):
        environment = {**os.environ, **aws.variables, "TMPDIR": str(tmp_path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [LLM_TRAINER, *words], env=environment, cwd=tmp_path, text=True, start_new_session=True, **pipes
        )
        commands.append(Command(process, tmp_path))
        return commands[-1]

    yield begin_command
    for command in commands:
        command.process.kill()
        command.process.wait()


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows")


def name_channels(rows):
    """A model in S3, about which nothing can be checked here."""
    return ["--channels", f'{{"train": "{rows}", "model": "s3://bucket/model/"}}']


def test_the_checks_of_a_job(aws, begin, rows, tiny_model):
    command = begin(*JOB, "--channels", f'{{"train": "{rows}", "model": "{tiny_model}"}}')
    command.await_that(command.list_processes)
    assert command.interrupt() == ["Stopped: nothing was uploaded, and no job was started."]
    assert aws.requests == []


def test_an_upload(aws, begin, rows):
    with (rows / "large.jsonl").open("wb") as file:
        file.truncate(3 * PART_BYTES)
    release = aws.hold("PUT")
    command = begin(*JOB, *name_channels(rows))
    command.await_that(lambda: aws.has_been_asked("PUT"))
    told = command.interrupt(release)
    assert told[-1] == "Stopped: no job was started. The same command goes on with what is not in S3 yet."
    assert "Uploads" not in aws.client("s3").list_multipart_uploads(Bucket="bucket")
    assert aws.list_arguments("CreateTrainingJob") == []


def test_the_request_that_starts_a_job_is_whole(aws, begin, rows):
    release = aws.hold("CreateTrainingJob")
    command = begin(*JOB, *name_channels(rows))
    command.await_that(lambda: aws.has_been_asked("CreateTrainingJob"))
    told = command.interrupt(release)
    assert [line for line in told if line.startswith("Started arn:")]
    assert "llm-trainer watch job-1" in told


def test_watching(aws, begin):
    aws.answers["DescribeTrainingJob"] = lambda asked: RUNNING
    command = begin("watch", "job-1")
    command.await_that(lambda: aws.has_been_asked("DescribeLogStreams"))
    (told,) = command.interrupt()
    assert told.startswith("The job goes on. `llm-trainer stop job-1` ends it")


@pytest.mark.parametrize("held", ["CreateEndpointConfig", None])
def test_deploying(aws, begin, held):
    aws.put_files(RESULT, {"serving.env": "HF_MODEL_ID=/opt/ml/model\nOPTION_MODEL_ID=/opt/ml/model\n"})
    aws.answers["DescribeTrainingJob"] = lambda asked: FINISHED_JOB
    aws.answers["DescribeEndpoint"] = lambda asked: {"EndpointName": "job-1", "EndpointStatus": "Creating"}
    release = aws.hold(held) if held else None
    command = begin("deploy", "job-1", "--instance_type", "ml.m4.xlarge")  # an old type, as moto has it
    command.await_that(lambda: aws.has_been_asked(held or "DescribeEndpoint"))
    told = command.interrupt(release)
    assert told[0] == "It costs money until `llm-trainer delete job-1`."
    stopped = "Stopped: endpoint job-1 goes on. `llm-trainer list` shows whether it answers."
    assert told[1:] == ([] if held else ["Endpoint job-1: Creating", stopped])
    assert len(aws.list_arguments("CreateEndpoint")) == 1
