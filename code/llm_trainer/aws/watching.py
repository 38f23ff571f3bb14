# SPDX-License-Identifier: Apache-2.0
"""A training job as it goes on: its states and the log of each of its instances, until it ends."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llm_trainer.aws.clients import open_client
from llm_trainer.aws.refusals import is_passing
from llm_trainer.aws.screen import Screen
from llm_trainer.common.errors import quote_error
from llm_trainer.common.units import show_duration

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
PAUSE_SECONDS = 5.0  # CloudWatch shows a line a few seconds after it was written
ENDS = ("Completed", "Failed", "Stopped")


@dataclass
class JobLog:
    """The log of a job, read from where it was left."""

    name: str
    tokens: dict[str, str] = field(default_factory=dict)  # by stream: where its next events begin
    client: Any = field(default_factory=lambda: open_client("logs"))

    def read_new(self) -> Iterator[str]:
        """Yield the lines that are new. Those of several hosts begin with the host's name."""
        streams = list(self.list_streams())
        hosts = {stream: stream.partition("/")[2].rpartition("-")[0] for stream in streams}
        for stream in streams:
            mark = f"[{hosts[stream]}] " if len(set(hosts.values())) > 1 else ""
            for event in self.read_stream(stream):
                yield mark + event["message"]

    def list_streams(self) -> Iterator[str]:
        """Yield the names of the log's streams: one for each host, and for each start after a spot interruption."""
        pages = self.client.get_paginator("describe_log_streams")
        try:
            for page in pages.paginate(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self.name}/"):
                yield from (stream["logStreamName"] for stream in page["logStreams"])
        except self.client.exceptions.ResourceNotFoundException:  # no job of this account has written a line yet
            return

    def read_stream(self, stream: str) -> Iterator[dict[str, Any]]:
        """Yield the new events of a stream."""
        while True:
            known = self.tokens.get(stream)
            where = {"nextToken": known} if known else {"startFromHead": True}
            answer = self.client.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, **where)
            yield from answer["events"]
            self.tokens[stream] = answer["nextForwardToken"]
            if self.tokens[stream] == known or not answer["events"]:
                return


def describe_job(name: str) -> dict[str, Any]:
    """Return what SageMaker tells of a training job."""
    return open_client("sagemaker").describe_training_job(TrainingJobName=name)


def follow_job(job: dict[str, Any]) -> dict[str, Any]:
    """Print a job's states and log as they come, until the job ends; return its description then.

    While AWS does not answer, it is asked again.
    """
    name, job_log, outage = job["TrainingJobName"], JobLog(job["TrainingJobName"]), Outage()
    num_shown, is_last = 0, False
    with Screen() as screen:
        while True:
            states = job.get("SecondaryStatusTransitions", [])
            for state in states[num_shown:]:
                screen.show(f"{state['Status']}: {state.get('StatusMessage', '')}".rstrip(": "))
            num_shown = len(states)
            with outage.outlast(screen):
                for line in job_log.read_new():
                    screen.show(line)
                if is_last:
                    return job
            time.sleep(PAUSE_SECONDS)
            is_last = job["TrainingJobStatus"] in ENDS  # the last lines come a little later
            if not is_last:
                with outage.outlast(screen):
                    job = describe_job(name)


@dataclass
class Outage:
    """Requests that AWS does not answer for a while. Each kind is told once."""

    told: set[str] = field(default_factory=set)

    @contextmanager
    def outlast(self, screen: Screen) -> Iterator[None]:
        """Tell of a request within the block that is not answered, and go on behind the block."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            if not is_passing(error):
                raise
            reason = quote_error(error)
            if reason not in self.told:
                screen.show(f"AWS does not answer now, and is asked again ({reason}).")
            self.told.add(reason)


def describe_end(job: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on how a job stands or ended: state, times, reason of a failure, last metrics, and the result."""
    state = job["TrainingJobStatus"]
    detail = job.get("SecondaryStatus", state)
    times = [
        f"{show_duration(job[key])} {word}"
        for key, word in (("TrainingTimeInSeconds", "of training"), ("BillableTimeInSeconds", "billed an instance"))
        if job.get(key)
    ]
    yield "; ".join([state if detail == state else f"{state} ({detail})", *times])
    if reason := job.get("FailureReason"):
        yield f"Reason: {reason}"
    metrics = {each["MetricName"]: each["Value"] for each in job.get("FinalMetricDataList", [])}
    if metrics:
        yield "Last metrics: " + ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    if state != "InProgress" and (place := find_result(job)):
        yield f"Result: {place}"


def find_result(job: Mapping[str, Any]) -> str | None:
    """Return the S3 address of a job's model: an archive, or a prefix. None where it has left none."""
    return (job.get("ModelArtifacts") or {}).get("S3ModelArtifacts")
