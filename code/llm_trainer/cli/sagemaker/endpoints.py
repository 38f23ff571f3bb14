# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer deploy`, `invoke` and `delete`: endpoints that serve what training jobs have left."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import find_region, find_role
from llm_trainer.aws.deployment import (
    Deployment,
    ask_endpoint,
    await_endpoint,
    create_endpoint,
    delete_endpoint,
    find_artefacts,
    find_base,
    read_serving_settings,
)
from llm_trainer.aws.image import resolve_image
from llm_trainer.aws.lmi_image import choose_host, find_lmi_image
from llm_trainer.aws.watching import describe_job
from llm_trainer.cli.sagemaker.jobs import ask_aws, tell_stop
from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.launcher.stop_signal import withhold_stops
from llm_trainer.readers.images import ImageError, encode_uri


@dataclass(frozen=True)
class DeployOptions:
    """The arguments of `llm-trainer deploy`."""

    job: str
    instance_type: str
    instance_count: int = 1
    name: str | None = None  # None: the job's
    image: str | None = None  # None: AWS's LMI image of the region
    role: str | None = None  # None: the job's
    model_id: str | None = None


def deploy(options: DeployOptions) -> int:
    """Serve a job's result, wait until it answers, and return the exit code."""

    def serve() -> int:
        with tell_stop("Stopped: no endpoint was created."):
            job = describe_job(options.job)
            place = find_artefacts(job)
            settings = read_serving_settings(place)
            deployment = plan_deployment(options, job, settings)
        name = deployment.name
        with withhold_stops():  # all parts of the endpoint or none
            create_endpoint(deployment, place, settings)
            log.info(f"It costs money until `llm-trainer delete {name}`.")
        with tell_stop(f"Stopped: endpoint {name} goes on. `llm-trainer list` shows whether it answers."):
            await_endpoint(name)
        log.info(f'llm-trainer invoke {name} "QUESTION"')
        return 0

    return ask_aws(serve)


def plan_deployment(options: DeployOptions, job: Mapping[str, Any], settings: Mapping[str, str]) -> Deployment:
    """Return the endpoint for a job's result, whose serving.env has these settings. Asks AWS for what is not given."""
    image = options.image or find_lmi_image(find_region())
    return Deployment(
        name=options.name or options.job,
        instance_type=options.instance_type,
        instance_count=options.instance_count,
        image=resolve_image(image) if options.image else image,
        role=find_role(options.role or job["RoleArn"]),
        model_id=options.model_id or find_base(job, settings),
        host=choose_host(image),
    )


@dataclass(frozen=True)
class InvokeOptions:
    """The arguments of `llm-trainer invoke`."""

    name: str
    question: str
    max_tokens: int
    json: bool = False
    image: Sequence[str] = ()  # names of files


def read_images(files: Sequence[str]) -> list[str]:
    """Return image files as data URIs. Raises UserError where one is no image."""
    try:
        return [encode_uri(Path(file)) for file in files]
    except ImageError as error:
        raise UserError(f"--image {error}") from error


def invoke(options: InvokeOptions) -> int:
    """Print an endpoint's answer to a question, and return the exit code."""
    name = options.name

    def ask() -> int:
        answer = ask_endpoint(name, options.question, options.max_tokens, read_images(options.image))
        if options.json:
            print(json.dumps(answer))
            return 0
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"Endpoint {name} answers in other words than a chat: --json shows them.") from None
        print(text)
        return 0

    return ask_aws(ask)


def delete(name: str) -> int:
    """Delete an endpoint with its configuration and model, and return the exit code. Files in S3 stay."""

    def remove() -> int:
        with tell_stop("Stopped: the same command deletes what is left."):
            deleted = delete_endpoint(name)
        if not deleted:
            raise UserError(f"There is no endpoint {name!r} here: `llm-trainer list` shows all; check the region.")
        log.info(f"Deleted {', '.join(deleted)} {name}. The files in S3 stay.")
        return 0

    return ask_aws(remove)
