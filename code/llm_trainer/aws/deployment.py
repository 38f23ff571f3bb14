# SPDX-License-Identifier: Apache-2.0
"""An endpoint that serves a job's result with AWS's LMI container, as the job's serving.env says.

Model, configuration and endpoint have one name, so that one name deletes them.
"""

import json
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llm_trainer.aws.clients import open_client, split_uri
from llm_trainer.aws.uploads import list_sizes
from llm_trainer.aws.watching import find_result
from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.serving.lmi_files import ADAPTER_NAME, ENVIRONMENT, LIMIT, read_image_limit

PAUSE_SECONDS = 15.0
STARTUP_SECONDS, DOWNLOAD_SECONDS = 1800, 3600  # for a large model; SageMaker's limits are 3600 each
MAX_ENVIRONMENT_BYTES = 1 << 16
USES_ADAPTER = "OPTION_ENABLE_LORA"
MODEL_ID, REVISION = "OPTION_MODEL_ID", "OPTION_REVISION"
PARTS = (("endpoint", "EndpointName"), ("endpoint_config", "EndpointConfigName"), ("model", "ModelName"))


@dataclass(frozen=True)
class Deployment:
    """An endpoint as a user asks for it."""

    name: str
    instance_type: str
    instance_count: int
    image: str  # a URI
    role: str  # an ARN
    model_id: str | None = None  # of an adapter's base that LMI cannot have from the Hub: an S3 prefix
    host: Mapping[str, str] = field(default_factory=dict)  # what the variant says of the hosts' driver


def find_artefacts(job: Mapping[str, Any]) -> str:
    """Return the S3 address of a job's result: an archive, or a prefix that ends in a slash.

    Raises UserError for a job that has none.
    """
    place = find_result(job)
    if job["TrainingJobStatus"] not in ("Completed", "Stopped") or not place:
        raise UserError(f"{job['TrainingJobName']} is {job['TrainingJobStatus']}: only what a job has left is served.")
    return place if place.endswith(".tar.gz") else place.rstrip("/") + "/"


def read_serving_settings(place: str) -> dict[str, str]:
    """Return the variables of the serving.env in a result. Raises UserError where there is none."""
    client = open_client("s3")
    bucket, key = split_uri(place)
    try:
        if key.endswith("/"):
            text = client.get_object(Bucket=bucket, Key=f"{key}{ENVIRONMENT}")["Body"].read(MAX_ENVIRONMENT_BYTES)
        else:
            text = find_member(client.get_object(Bucket=bucket, Key=key)["Body"], ENVIRONMENT)
    except client.exceptions.NoSuchKey:
        text = b""
    lines = text.decode("utf-8", "replace").splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    if not settings:
        raise UserError(
            f"{place} has no {ENVIRONMENT}: LMI cannot serve this result; manifest.json says why, and "
            "merge_weights=true makes one that it can."
        )
    return settings


def find_member(stream: Any, name: str) -> bytes:
    """Return the content of a file in a packed result, which is read no further than to it; empty without one."""
    with tarfile.open(fileobj=stream, mode="r|gz") as tar:
        for member in tar:
            if member.name.removeprefix("./") == name and (content := tar.extractfile(member)):
                return content.read(MAX_ENVIRONMENT_BYTES)
    return b""


def create_endpoint(deployment: Deployment, place: str, settings: Mapping[str, str]) -> None:
    """Create model, configuration and endpoint. Where one is refused, those before it are deleted again."""
    client, name = open_client("sagemaker"), deployment.name
    variant = {
        "VariantName": "main",
        "ModelName": name,
        "InstanceType": deployment.instance_type,
        "InitialInstanceCount": deployment.instance_count,
        "ContainerStartupHealthCheckTimeoutInSeconds": STARTUP_SECONDS,
        "ModelDataDownloadTimeoutInSeconds": DOWNLOAD_SECONDS,
        **deployment.host,
    }
    container = build_container(deployment, place, settings)
    client.create_model(ModelName=name, ExecutionRoleArn=deployment.role, PrimaryContainer=container)
    with undo(client.delete_model, ModelName=name):
        client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
        with undo(client.delete_endpoint_config, EndpointConfigName=name):
            client.create_endpoint(EndpointName=name, EndpointConfigName=name)


@contextmanager
def undo(delete: Any, **arguments: str) -> Iterator[None]:
    """Delete something again where the block behind it is refused."""
    try:
        yield
    except BaseException:
        delete(**arguments)
        raise


def find_base(job: Mapping[str, Any], settings: Mapping[str, str]) -> str | None:
    """Return the S3 prefix of an adapter's base where it came as a channel; None where the settings name a base.

    Raises UserError where LMI cannot have the base.
    """
    from llm_trainer.common.hub import needs_token

    model_id = settings.get(MODEL_ID)
    if model_id is None:
        channels = {each["ChannelName"]: each["DataSource"] for each in job.get("InputDataConfig", [])}
        prefix = channels.get("model", {}).get("S3DataSource", {}).get("S3Uri", "").rstrip("/") + "/"
        if prefix != "/" and "config.json" in list_sizes(open_client("s3"), prefix):
            return prefix
        raise UserError(
            "The base of this adapter came as a channel without a config.json in S3, which LMI cannot read: give the "
            "S3 prefix of the base's files with --model_id s3://BUCKET/PREFIX/."
        )
    if not model_id.startswith(("/", "s3://")) and needs_token(model_id):
        raise UserError(
            f"The base {model_id} is gated or private, and LMI takes a token only where everyone who may describe the "
            "endpoint's model can read it: give the S3 prefix of the base's files with --model_id "
            "s3://BUCKET/PREFIX/, or train with merge_weights=true."
        )
    return None


def build_container(deployment: Deployment, place: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the PrimaryContainer that serves a result."""
    base = {MODEL_ID: deployment.model_id} if deployment.model_id else {}
    if base:  # a revision is the Hub's
        settings = {name: value for name, value in settings.items() if name != REVISION}
    is_prefix = place.endswith("/")
    source = {
        "S3Uri": place,
        "S3DataType": "S3Prefix" if is_prefix else "S3Object",
        "CompressionType": "None" if is_prefix else "Gzip",
    }
    return {
        "Image": deployment.image,
        "ModelDataSource": {"S3DataSource": source},
        "Environment": {**settings, **base},
    }


def await_endpoint(name: str) -> None:
    """Return when an endpoint answers. Raises UserError where it never will."""
    client, shown = open_client("sagemaker"), ""
    while True:
        endpoint = client.describe_endpoint(EndpointName=name)
        status = endpoint["EndpointStatus"]
        if status != shown:
            log.info(f"Endpoint {name}: {status}")
            shown = status
        if status == "InService":
            return
        if status in ("Failed", "OutOfService", "Deleting"):
            reason = endpoint.get("FailureReason", "AWS gives no reason").rstrip(".")
            raise UserError(
                f"Endpoint {name} is {status} ({reason}): see its log, and delete it with `llm-trainer delete {name}`."
            )
        time.sleep(PAUSE_SECONDS)


def ask_endpoint(name: str, question: str, max_tokens: int, images: Sequence[str] = ()) -> dict[str, Any]:
    """Return an endpoint's answer to a question, in OpenAI's words. Asks the adapter where the endpoint has one.

    `images` are addresses or data URIs, which come before the question. Raises UserError for more than it takes.
    """
    model = open_client("sagemaker").describe_model(ModelName=name)
    variables = (model.get("PrimaryContainer") or {}).get("Environment") or {}
    adapter = {"adapters": ADAPTER_NAME} if variables.get(USES_ADAPTER) == "true" else {}
    limit = read_image_limit(variables)
    if limit is not None and len(images) > limit:
        raise UserError(
            f"{len(images)} images and endpoint {name} takes {limit} a request (its {LIMIT}): leave some out, or train "
            "with a larger max_images_per_row."
        )
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*parts, {"type": "text", "text": question}] if parts else question
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, **adapter}
    client = open_client("sagemaker-runtime")
    answer = client.invoke_endpoint(EndpointName=name, ContentType="application/json", Body=json.dumps(body))
    return json.loads(answer["Body"].read())


def delete_endpoint(name: str) -> list[str]:
    """Delete an endpoint, its configuration and its model, as far as they are there; return the names of the parts."""
    from botocore.exceptions import ClientError

    client, deleted = open_client("sagemaker"), []
    for part, argument in PARTS:
        try:
            getattr(client, f"delete_{part}")(**{argument: name})
        except ClientError as error:
            if "Could not find" not in error.response["Error"].get("Message", ""):
                raise
        else:
            deleted.append(part.replace("_", " "))
    return deleted
