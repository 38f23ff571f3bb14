# SPDX-License-Identifier: Apache-2.0
"""What a launcher puts into the job's journal: the job at each attempt, its phases, its restarts and its end.

The first training host's launcher writes it; the others' hand it what they measure (hosts.py).
"""

import os
from typing import Any

import pynvml

from llm_trainer import __version__
from llm_trainer.common.errors import Failure
from llm_trainer.common.versions import read_versions
from llm_trainer.config.checks import count_processes
from llm_trainer.config.environment import Environment, read_json_object
from llm_trainer.config.schema import Settings, redact
from llm_trainer.host.nvidia_driver import read_driver
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.inputs import Inputs
from llm_trainer.journal.journal import FILE_NAME, MANIFEST, Journal
from llm_trainer.journal.timeline import Timeline
from llm_trainer.launcher.cluster import ClusterLink
from llm_trainer.launcher.supervisor import Verdict


class JobEventWriter:
    """One host's."""

    def __init__(self, environment: Environment, hosts: ClusterLink) -> None:
        self.environment = environment
        self.hosts = hosts
        self.journal = Journal(environment.output_dir / "data" / FILE_NAME)

    def write(self, kind: str, **fields: Any) -> None:
        if self.environment.node_rank == 0:
            self.journal.write(kind, **fields)
        else:
            self.hosts.send_record(kind, **fields)

    def begin(self, settings: Settings, inputs: Inputs, timeline: Timeline) -> None:
        """The first attempt begins, after the phases so far; from now on records of other hosts are taken.

        The journal of an earlier job in the same tree goes on with a job that does, and goes otherwise.
        """
        if self.environment.node_rank > 0:
            return
        if not (settings.training.use_checkpoints and checkpoint_dir.list_checkpoints(inputs.checkpoint_dir)):
            self.journal.clear()
        self.started = timeline.started
        self.tell_job(settings, 1)
        ended_at = timeline.started
        for name, seconds in timeline.seconds.items():
            ended_at += seconds
            host = self.environment.current_host
            self.write("phase", time=round(ended_at, 3), name=name, seconds=seconds, host=host)
        self.hosts.take_record = lambda record: self.write(**record)

    def begin_again(self, settings: Settings, attempt: int, cause: Failure) -> None:
        """Another attempt begins, after the failure of the one before."""
        if self.environment.node_rank > 0:
            return
        text = f"{cause.reason} Attempt {attempt}: the workers start again from the newest checkpoint."
        self.write("event", host=self.environment.current_host, level="warning", text=text)
        self.tell_job(settings, attempt)

    def tell_job(self, settings: Settings, attempt: int) -> None:
        self.write(
            "job",
            name=os.environ.get("TRAINING_JOB_NAME"),
            arn=os.environ.get("TRAINING_JOB_ARN"),
            attempt=attempt,
            started=round(self.started, 3),
            hosts=self.environment.hosts,
            billed_hosts=self.environment.num_billed_hosts,
            world_size=count_processes(settings, self.environment) * len(self.environment.hosts),
            settings=redact(settings),
            environment=describe_environment(self.environment),
        )

    def end(self, verdict: Verdict, inputs: Inputs) -> None:
        """The last record: nothing of this job comes after it."""
        if self.environment.node_rank > 0:
            return
        if verdict.failure:
            self.write("end", status="failed", reason=verdict.failure.reason)
            return
        is_stopped = verdict.what == "stopped" or read_json_object(inputs.model_dir / MANIFEST).get("stopped")
        self.write("end", status="stopped" if is_stopped else "done", reason=None)


def describe_environment(environment: Environment) -> dict[str, Any]:
    """The image, the packages in it and the machine below it. An image does not know its name: who starts it may."""
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
