# SPDX-License-Identifier: Apache-2.0
"""Options of a submission: what SageMaker has to know of a job beside its settings.

They stand in the section `job` of a YAML file of settings, and on the command line. The latter wins.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llm_trainer.common.errors import cut_quote
from llm_trainer.common.redaction import collect_secrets, holds_secret
from llm_trainer.config.hyperparameter_decoding import decode_value
from llm_trainer.config.load import describe_rule, suggest_name
from llm_trainer.config.schema import find_plain_types, show_value

S3_URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?")
JOB_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
ROLE = re.compile(r"(arn:aws[a-z-]*:iam::\d{12}:role/)?[\w+=,.@/-]+")
CHANNEL_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
REQUIRED = {
    "image": "give the image's URI in ECR, or repository:tag",
    "role": "give the ARN of the role that the job runs under",
    "output": "give the S3 prefix of the results, such as s3://BUCKET/output",
}


class JobOptions(BaseModel):
    """Options of a job for SageMaker, beside its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)  # as YAML reads NAME: 1

    name: str | None = Field(None, description="Name of the training job. Default: the YAML file's name and the time.")
    image: str | None = Field(
        None, description="Image in ECR: its URI, or `repository:tag` of this account. The job runs it by its digest."
    )
    role: str | None = Field(None, description="Role that the job runs under: its ARN, or its name in this account.")
    instance_type: str | None = Field(None, description="Type of the instances, such as ml.g6.2xlarge.")
    instance_count: int = Field(1, ge=1, description="Number of the instances.")
    instance_preferences: dict[str, int] | None = Field(
        None,
        description="In place of instance_type: up to five types, each with its number of instances. SageMaker takes "
        "the first that has capacity.",
    )
    volume_gb: int = Field(
        100, ge=1, description="Disk of an instance in GB. Instances with NVMe disks have their own."
    )
    spot: bool = Field(False, description="Run on spot instances. An interrupted job goes on from its checkpoints.")
    max_wait_seconds: int | None = Field(
        None, ge=1, description="Longest time for waiting and running on spot. Default: twice `max_run_seconds`."
    )
    keep_alive_seconds: int | None = Field(
        None, ge=1, le=21600, description="Keep the instances for a next job of the same kind (warm pool)."
    )
    channels: dict[str, str] = Field(
        default={},
        description="Folders of this machine or S3 prefixes by channel: train, validation, model, adapter, "
        "teacher, rewards.",
    )
    fast_file: list[str] | None = Field(
        None, description="Channels that are read from S3 as the job needs them (FastFile), and not copied before."
    )
    sharded: list[str] | None = Field(
        None, description="Channels with data whose files are dealt out over the instances (ShardedByS3Key)."
    )
    output: str | None = Field(None, description="S3 prefix of the results. Each job has a folder of its name there.")
    uploads: str | None = Field(
        None, description="S3 prefix of the uploads. Default: `input` in the bucket of `output`."
    )
    checkpoints: str | None = Field(
        None,
        description="S3 prefix of the checkpoints, of this run alone. Default: `checkpoints` and the job's name in the "
        "bucket of `output`.",
    )
    compress_output: bool = Field(False, description="Leave a model.tar.gz. It takes time, and weights hardly shrink.")
    output_kms_key: str | None = Field(None, description="KMS key that encrypts uploads and results.")
    volume_kms_key: str | None = Field(None, description="KMS key of the disks. Instances with NVMe disks take none.")
    subnets: list[str] | None = Field(None, description="Subnets of a VPC that the job runs in.")
    security_groups: list[str] | None = Field(None, description="Security groups of the job in that VPC.")
    network_isolation: bool = Field(False, description="Give the job no network: model and data come as channels.")
    encrypt_traffic: bool = Field(False, description="Encrypt what the instances send each other. It slows training.")
    environment: dict[str, str] = Field(
        default={}, description="Environment variables. A secret is given as the ARN of a secret or parameter."
    )
    tags: dict[str, str] = Field(default={}, description="Tags of the training job.")


OPTIONS = JobOptions.model_fields


def read_options(given: Mapping[str, Any], problems: list[str]) -> JobOptions:
    """Return the options as far as they are valid. A sentence for every mistake is added to `problems`."""
    values: dict[str, Any] = {}
    for name, raw in given.items():
        if name not in OPTIONS:
            problems.append(f"job has {cut_quote(repr(name))}, which is no option: {suggest_name(name, [*OPTIONS])}")
            continue
        types, nullable = find_plain_types(OPTIONS[name])
        value = decode_value(raw, types, nullable) if isinstance(raw, str) else raw
        if value is None:
            continue
        if fault := find_fault(name, value, raw):
            problems.append(fault)
        else:
            values[name] = value
    options = JobOptions(**values)
    problems += find_contradictions(options)
    return options


def find_fault(name: str, value: Any, raw: Any) -> str | None:
    """Return a sentence where the value breaks the rule of its option, else None."""
    field = OPTIONS[name]
    is_wrong = isinstance(value, bool) and field.annotation is not bool  # pydantic takes it for a number
    try:
        adapter = TypeAdapter[Any](Annotated[field.annotation, field], config=JobOptions.model_config)  # type: ignore[arg-type]
        adapter.validate_python(value)
    except ValidationError:
        is_wrong = True
    if is_wrong:
        return f"{name}={cut_quote(repr(raw))} is not valid: it must be {describe_rule(field)}."
    return None


def find_contradictions(options: JobOptions) -> Iterator[str]:
    """Yield a sentence for every option that is missing, malformed, or contradicts another."""
    yield from (f"{name} is missing: {fix}." for name, fix in REQUIRED.items() if not getattr(options, name))
    yield from find_malformed(options)
    if (options.instance_type is None) == (options.instance_preferences is None):
        yield "Either instance_type or instance_preferences says where the job runs: give one of them."
    if len(options.instance_preferences or {}) > 5:
        yield "instance_preferences names more than five types: leave the best five."
    if options.spot and options.keep_alive_seconds:
        yield "spot=true and keep_alive_seconds exclude each other: a spot instance cannot be kept warm; remove one."
    if options.spot and options.instance_preferences:
        yield "spot=true and instance_preferences exclude each other: name one instance_type for spot."
    if options.max_wait_seconds and not options.spot:
        yield f"max_wait_seconds={options.max_wait_seconds} is for spot=true alone: remove it."
    if bool(options.subnets) != bool(options.security_groups):
        yield "subnets and security_groups belong together: give both, or neither."


def find_malformed(options: JobOptions) -> Iterator[str]:
    """Yield a sentence for every name, address or variable that SageMaker would refuse."""
    if options.name and not (JOB_NAME.fullmatch(options.name) and len(options.name) <= 63):
        yield f"name={options.name!r} is no job's name: write at most 63 letters, digits and inner hyphens."
    if options.role and not ROLE.fullmatch(options.role):
        yield f"role={options.role!r} is neither the ARN nor the name of a role: copy the ARN from IAM."
    for name in ("output", "uploads", "checkpoints"):
        uri = getattr(options, name)
        if uri and not S3_URI.fullmatch(uri):
            yield f"{name}={uri!r} is no S3 prefix: write s3://BUCKET/PREFIX."
    for channel, place in options.channels.items():
        if place.startswith("s3:") and not S3_URI.fullmatch(place):
            yield f"channels has {channel}={place!r}, which is no S3 prefix: write s3://BUCKET/PREFIX."
    for kind in ("environment", "tags"):
        yield from find_secrets(getattr(options, kind), kind)


def find_secrets(values: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Yield a sentence for each value that is a secret, which everyone who may describe the job could read.

    `kind` is the place of the values in the request. ARNs of secrets are no secrets.
    """
    for name, value in values.items():
        if holds_secret(name, value) or any(collect_secrets(value)):
            yield (
                f"{name} holds a secret, and everyone who may describe the job can read its {kind}: store it in "
                "Secrets Manager, and give the secret's ARN in its place."
            )


def format_option_default(name: str) -> str:
    """Return the default of an option as a user writes it, empty where there is none."""
    default = OPTIONS[name].default
    return "" if default in (None, {}) else show_value(default)
