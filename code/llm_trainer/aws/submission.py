# SPDX-License-Identifier: Apache-2.0
"""The request that starts a training job, made of its options and settings. Nothing here talks to AWS."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_trainer import __version__
from llm_trainer.aws.options import JobOptions
from llm_trainer.aws.request_limits import MAX_SECONDS, find_breaches
from llm_trainer.common.metric_definitions import define_metrics
from llm_trainer.config.hyperparameter_decoding import parse_literal

CHECKPOINT_DIR = "/opt/ml/checkpoints"
DEFAULT_RUN_SECONDS = 24 * 60 * 60  # SageMaker's own default
MLFLOW_RESOURCE = re.compile(r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]*:\d{12}:mlflow-[a-zA-Z-]*/.*")


@dataclass(frozen=True)
class Submission:
    """A job that is to be submitted: its options, and what was made of its settings and channels."""

    options: JobOptions
    name: str
    hyperparameters: Mapping[str, str]  # as `encode_settings` writes them
    channels: Mapping[str, str]  # S3 prefixes
    max_run_seconds: int = DEFAULT_RUN_SECONDS
    uses_checkpoints: bool = True
    mlflow: Mapping[str, str | None] | None = None  # the settings `mlflow_uri`, `mlflow_experiment_name`, `run_name`


def choose_name(stem: str) -> str:
    """Return a name for a job that begins like its file and ends with the time, which SageMaker takes."""
    words = re.sub(r"[^a-zA-Z0-9]+", "-", stem).strip("-") or "llm-trainer"
    return f"{words[:47].rstrip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"


def encode_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as hyperparameters: texts of one line as they are, and any other value as JSON.

    SageMaker takes no line breaks.
    """
    return {
        name: value if isinstance(value, str) and "".join(value.splitlines()) == value else json.dumps(value)
        for name, value in settings.items()
    }


def find_request_problems(submission: Submission) -> Iterator[str]:
    """Yield a sentence for everything in a submission that SageMaker would refuse."""
    role = str(submission.options.role)
    arn = role if role.startswith("arn:") else f"arn:aws:iam::{'0' * 12}:role/{role}"
    yield from find_breaches(build_request(submission, str(submission.options.image), arn))
    wait = submission.options.max_wait_seconds
    if wait and wait < submission.max_run_seconds:
        yield (
            f"max_wait_seconds={wait} is less than max_run_seconds={submission.max_run_seconds}: waiting and running "
            "together cannot be shorter; raise it."
        )


def build_request(submission: Submission, image: str, role: str) -> dict[str, Any]:
    """Return CreateTrainingJob's arguments. `image` is a URI, and `role` an ARN."""
    options = submission.options
    request = {
        "TrainingJobName": submission.name,
        "HyperParameters": dict(submission.hyperparameters),
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "MetricDefinitions": define_job_metrics(submission.hyperparameters),
        },
        "RoleArn": role,
        "InputDataConfig": [build_channel(name, uri, options) for name, uri in submission.channels.items()],
        "OutputDataConfig": build_output(options),
        "ResourceConfig": build_resources(options),
        "StoppingCondition": build_stopping_condition(submission),
        "CheckpointConfig": build_checkpoints(submission),
        "VpcConfig": build_network(options),
        "EnableManagedSpotTraining": options.spot,
        "EnableNetworkIsolation": options.network_isolation,
        "EnableInterContainerTrafficEncryption": options.encrypt_traffic,
        "Environment": {"LLM_TRAINER_IMAGE": image, **options.environment},
        "MlflowConfig": build_mlflow(submission.mlflow or {}),
        "Tags": [{"Key": key, "Value": value} for key, value in {"llm-trainer": __version__, **options.tags}.items()],
    }
    return {name: value for name, value in request.items() if value not in ({}, [], False)}


def define_job_metrics(hyperparameters: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the MetricDefinitions of a job with these hyperparameters, its rewards among them."""
    rewards = parse_literal(hyperparameters.get("reward_functions", ""))
    return define_metrics(hyperparameters.get("method", "sft"), rewards if isinstance(rewards, list) else [])


def build_channel(name: str, uri: str, options: JobOptions) -> dict[str, Any]:
    """Return the member of InputDataConfig that shows a prefix to the job as a folder."""
    given = describe_channel(name, options)
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": given["S3DistributionType"]}
    return {"ChannelName": name, "InputMode": given["TrainingInputMode"], "DataSource": {"S3DataSource": source}}


def describe_channel(name: str, options: JobOptions) -> dict[str, str]:
    """Return what the job will read of a channel in its inputdataconfig.json."""
    return {
        "TrainingInputMode": "FastFile" if name in (options.fast_file or ()) else "File",
        "S3DistributionType": "ShardedByS3Key" if name in (options.sharded or ()) else "FullyReplicated",
    }


def build_output(options: JobOptions) -> dict[str, str]:
    """Return OutputDataConfig."""
    key = {"KmsKeyId": options.output_kms_key} if options.output_kms_key else {}
    compression = "GZIP" if options.compress_output else "NONE"
    return {"S3OutputPath": (options.output or "").rstrip("/"), "CompressionType": compression, **key}


def build_resources(options: JobOptions) -> dict[str, Any]:
    """Return ResourceConfig: one type of instance, or several types in the order of their preference."""
    resources: dict[str, Any] = {"VolumeSizeInGB": options.volume_gb}
    if options.instance_preferences:
        preferences = options.instance_preferences.items()
        resources["InstancePreferences"] = [
            {"InstanceType": kind, "InstanceCount": count} for kind, count in preferences
        ]
    else:
        resources |= {"InstanceType": options.instance_type, "InstanceCount": options.instance_count}
    if options.keep_alive_seconds:
        resources["KeepAlivePeriodInSeconds"] = options.keep_alive_seconds
    if options.volume_kms_key:
        resources["VolumeKmsKeyId"] = options.volume_kms_key
    return resources


def build_stopping_condition(submission: Submission) -> dict[str, int]:
    """Return StoppingCondition. On spot, the time includes the wait for instances."""
    run = submission.max_run_seconds
    if not submission.options.spot:
        return {"MaxRuntimeInSeconds": run}
    wait = submission.options.max_wait_seconds or max(run, min(2 * run, MAX_SECONDS))
    return {"MaxRuntimeInSeconds": run, "MaxWaitTimeInSeconds": wait}


def build_checkpoints(submission: Submission) -> dict[str, str]:
    """Return CheckpointConfig with a prefix of this job's own, or an empty one for a job without checkpoints."""
    if not submission.uses_checkpoints:
        return {}
    prefix = submission.options.checkpoints or join_uri(find_bucket(submission.options), "checkpoints", submission.name)
    return {"S3Uri": prefix.rstrip("/"), "LocalPath": CHECKPOINT_DIR}


def build_network(options: JobOptions) -> dict[str, list[str]]:
    """Return VpcConfig, empty where the job runs in no VPC."""
    if not options.subnets or not options.security_groups:
        return {}
    return {"SecurityGroupIds": options.security_groups, "Subnets": options.subnets}


def build_mlflow(settings: Mapping[str, str | None]) -> dict[str, str]:
    """Return MlflowConfig for a tracking server of SageMaker's, empty for any other and for none."""
    if not MLFLOW_RESOURCE.fullmatch(settings.get("mlflow_uri") or ""):
        return {}
    members = {
        "MlflowResourceArn": settings["mlflow_uri"],
        "MlflowExperimentName": settings.get("mlflow_experiment_name"),
        "MlflowRunName": settings.get("run_name"),
    }
    return {name: value for name, value in members.items() if value}


def find_bucket(options: JobOptions) -> str:
    """Return the address of the bucket of the results."""
    return "s3://" + (options.output or "").removeprefix("s3://").partition("/")[0]


def join_uri(prefix: str, *parts: str) -> str:
    """Return an S3 address below a prefix."""
    return "/".join([prefix.rstrip("/"), *parts])
