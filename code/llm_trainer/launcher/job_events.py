# SPDX-License-Identifier: Apache-2.0
"""The launcher's records in the job's journal: the job at each attempt, its phases, its restarts and its end.

The first training host's launcher writes them; the others send it what they measure (launcher/hosts/cluster.py).
"""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from llm_trainer import __version__
from llm_trainer.common.versions import read_versions
from llm_trainer.config.environment import Environment
from llm_trainer.host.nvidia_driver import read_driver
from llm_trainer.journal.journal import FILE_NAME, Journal
from llm_trainer.journal.manifest import ADAPTER, read_leftover_manifest
from llm_trainer.journal.records import SCHEMA_VERSION, RecordKind
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.hosts.cluster import ClusterLink
from llm_trainer.launcher.supervisor import Attempts, Verdict


@dataclass(frozen=True)
class JobDescription:
    """The facts of a job that stay the same over its attempts."""

    started: float  # seconds since the epoch
    num_processes: int  # on each host
    settings: dict[str, Any]


class JobEventWriter:
    """Writes one host's events to the journal, by way of the first training host."""

    def __init__(self, environment: Environment, link: ClusterLink, job: JobDescription) -> None:
        """Take this host's environment, its link to the others, and the job."""
        self.environment = environment
        self.link = link
        self.job = job
        self.journal = Journal(environment.output_dir / "data" / FILE_NAME)
        self.has_begun = False  # an attempt has been written
        self.early: list[tuple[RecordKind, dict[str, Any]]] = []  # what came before that
        self.lock = threading.Lock()

    def write(self, kind: RecordKind, **fields: Any) -> None:
        """Append a record, here or by way of the first training host. That begins with the job's own."""
        if self.environment.node_rank > 0:
            self.link.send_record(kind, **fields)
            return
        with self.lock:
            if not self.has_begun:
                self.early.append((kind, {"time": round(time.time(), 3), **fields}))
                return
        self.journal.write(kind, **fields)

    def write_attempt(self, attempts: Attempts, timeline: Timeline, goes_on: bool) -> None:
        """Write that an attempt begins: the first under this first host, or one after the failure of another.

        `goes_on` tells whether there is a checkpoint to go on from: the journal of that run stays then.
        """
        if self.environment.node_rank > 0:
            return
        if self.has_begun:
            self.write_cause(attempts)
            self.write_job(attempts)
            return
        if not goes_on:
            self.journal.clear()
        self.write_job(attempts)  # every journal begins with one
        self.write_phases(timeline)
        self.write_cause(attempts)
        self.link.accept_records(lambda record: self.write(**record))
        with self.lock:
            self.has_begun = True
        for kind, fields in self.early:
            self.journal.write(kind, **fields)

    def write_cause(self, attempts: Attempts) -> None:
        """Write why the attempt before failed, where there was one."""
        if attempts.cause:
            text = f"{attempts.cause.reason} {attempts.describe()}"
            self.journal.write("event", host=self.environment.current_host, level="warning", text=text)

    def write_phases(self, timeline: Timeline) -> None:
        """Write the phases so far."""
        ended_at = timeline.started
        for name, seconds in timeline.seconds.items():
            ended_at += seconds
            host = self.environment.current_host
            self.journal.write("phase", time=round(ended_at, 3), name=name, seconds=seconds, host=host)

    def write_job(self, attempts: Attempts) -> None:
        """Write what the job is, as it is at the start of an attempt."""
        self.journal.write(
            "job",
            schema_version=SCHEMA_VERSION,
            name=os.environ.get("TRAINING_JOB_NAME"),
            arn=os.environ.get("TRAINING_JOB_ARN"),
            attempt=attempts.number,
            started=round(self.job.started, 3),
            hosts=attempts.members,
            billed_hosts=self.environment.num_billed_hosts,
            world_size=self.job.num_processes * len(attempts.members),
            settings=self.job.settings,
            environment=describe_environment(self.environment),
        )

    def write_end(self, verdict: Verdict, model_dir: Path) -> None:
        """Write how the job ended. Nothing of this job comes after this record."""
        if self.environment.node_rank > 0 or verdict.what == "leaderless":
            return
        if verdict.failure:
            self.journal.write("end", status="failed", reason=verdict.failure.reason)
            return
        folders = (model_dir, model_dir / ADAPTER)  # a merge may have been left out
        cut_short = any(read_leftover_manifest(folder)[0].get("stopped") for folder in folders)
        is_stopped = verdict.what == "stopped" or cut_short
        self.journal.write("end", status="stopped" if is_stopped else "done", reason=None)


def describe_environment(environment: Environment) -> dict[str, Any]:
    """Return the image, the packages in it, and the machine below it.

    An image does not know its own name: LLM_TRAINER_IMAGE gives it, where whoever starts the job sets that.
    """
    try:
        driver = read_driver()
    except pynvml.NVMLError:
        driver = None
    return {
        "version": __version__,
        "revision": os.environ.get("LLM_TRAINER_REVISION"),
        "image": os.environ.get("LLM_TRAINER_IMAGE"),
        "packages": read_versions(),
        "instance_type": environment.instance_type,
        "num_cpus": environment.num_cpus,
        "gpus": [gpu.name for gpu in driver.gpus] if driver else [],
        "driver": driver.version if driver else None,
    }
