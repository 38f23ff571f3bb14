# SPDX-License-Identifier: Apache-2.0
"""Limits of SageMaker on a request for a training job, told before anything is uploaded.

botocore's model of the service has the limits of every member. botocore itself checks types and lower limits alone.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from llm_trainer.common.errors import cut_quote
from llm_trainer.planning.instances import read_instances

# Members of the request -> the option or setting that they come from. Keys of maps stand for themselves.
NAMES = {
    "TrainingJobName": "name",
    "HyperParameters": "hyperparameters",
    "AlgorithmSpecification.TrainingImage": "image",
    "RoleArn": "role",
    "InputDataConfig": "channels",
    "OutputDataConfig.S3OutputPath": "output",
    "OutputDataConfig.KmsKeyId": "output_kms_key",
    "ResourceConfig.InstanceType": "instance_type",
    "ResourceConfig.InstanceCount": "instance_count",
    "ResourceConfig.InstancePreferences": "instance_preferences",
    "ResourceConfig.KeepAlivePeriodInSeconds": "keep_alive_seconds",
    "ResourceConfig.VolumeKmsKeyId": "volume_kms_key",
    "CheckpointConfig.S3Uri": "checkpoints",
    "VpcConfig.Subnets": "subnets",
    "VpcConfig.SecurityGroupIds": "security_groups",
    "Environment": "environment",
    "MlflowConfig.MlflowExperimentName": "mlflow_experiment_name",
    "MlflowConfig.MlflowRunName": "run_name",
    "Tags": "tags",
}
TIMES = {"MaxRuntimeInSeconds": "max_run_seconds", "MaxWaitTimeInSeconds": "max_wait_seconds"}
MAX_SECONDS = 28 * 24 * 3600  # the documents of StoppingCondition have it, and the service's model does not
JAVA_CLASSES = {r"\p{L}": r"\w", r"\p{N}": "", r"\p{Z}": " "}  # that Python's expressions lack
IN_CHANNEL = "write it to a YAML file in a channel `config`"


def find_breaches(request: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each value in CreateTrainingJob's arguments that SageMaker does not take."""
    yield from check_value(load_request_shape(), request, ())
    yield from find_wrong_types(request["ResourceConfig"])
    for tag in request.get("Tags", []):
        if tag["Key"].lower().startswith("aws:"):
            yield f"tags has {tag['Key']!r}, and AWS keeps names that begin with aws: to itself; choose another name."
    for member, name in TIMES.items():
        if (seconds := request["StoppingCondition"].get(member, 0)) > MAX_SECONDS:
            yield f"{name}={seconds} is more than the 28 days that SageMaker grants a job: lower it to {MAX_SECONDS}."


@cache  # reading it takes a third of a second
def load_request_shape() -> Any:
    """Return botocore's model of CreateTrainingJob's arguments."""
    import botocore.session

    service = botocore.session.get_session().get_service_model("sagemaker")
    return service.operation_model("CreateTrainingJob").input_shape


def check_value(shape: Any, value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each limit that a value, or anything in it, breaks. `path` leads to it in the request."""
    limits = shape.metadata
    if shape.type_name == "structure":
        for name, each in value.items():
            yield from check_value(shape.members[name], each, (*path, name))
    elif shape.type_name == "list":
        yield from check_size(limits, value, path, "entries")
        for each in value:
            yield from check_value(shape.member, each, path)
    elif shape.type_name == "map":
        yield from check_size(limits, value, path, "entries")
        for name, each in value.items():
            yield from check_value(shape.key, name, (*path, name))
            yield from check_value(shape.value, each, (*path, name))
    elif shape.type_name == "string":
        yield from check_size(limits, value, path, "characters")
        yield from check_pattern(limits, value, path)


def check_size(limits: Mapping[str, Any], value: Any, path: tuple[str, ...], unit: str) -> Iterator[str]:
    """Yield a sentence where a text, a list or a map is too long or too short."""
    least, most = limits.get("min", 0), limits.get("max", len(value))
    if not least <= len(value) <= most:
        name, is_setting = find_name(path)
        fix = f"{IN_CHANNEL}." if is_setting else "shorten it." if len(value) > most else "write more."
        yield f"{name} has {len(value)} {unit}, and SageMaker takes {least} to {most}: {fix}"


def check_pattern(limits: Mapping[str, Any], value: str, path: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence where a text has other characters than SageMaker takes."""
    pattern = limits.get("pattern", "")
    for java, python in JAVA_CLASSES.items():
        pattern = pattern.replace(java, python)
    if pattern and not re.fullmatch(pattern, value):
        name, is_setting = find_name(path)
        fix = IN_CHANNEL if is_setting else "change it"
        yield f"{name}={cut_quote(repr(value))} is not written as SageMaker asks ({pattern}): {fix}."


def find_name(path: tuple[str, ...]) -> tuple[str, bool]:
    """Return the words for a place in the request, and whether it is a setting's value."""
    if path[0] == "HyperParameters" and len(path) > 1:
        return path[1], True
    found = next((NAMES[key] for n in (1, 2) if (key := ".".join(path[:n])) in NAMES), ".".join(path))
    return (f"{found} {path[1]!r}" if path[0] == "Environment" and len(path) > 1 else found), found == "hyperparameters"


def find_wrong_types(resources: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each type of instance that SageMaker does not train on, or not with these disks.

    A family that is not known here may be newer than botocore's list.
    """
    known = load_request_shape().members["ResourceConfig"].members["InstanceType"].metadata["enum"]
    families = {kind.rpartition(".")[0] for kind in known}
    for choice in resources.get("InstancePreferences", [resources]):
        kind = choice["InstanceType"]
        if kind not in known and (kind.rpartition(".")[0] in families or not kind.startswith("ml.")):
            nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0)[0]
            yield f"instance_type={cut_quote(repr(kind))} is none that SageMaker trains on: the nearest is {nearest!r}."
        if choice["InstanceCount"] < 1:
            yield f"instance_preferences has {kind}={choice['InstanceCount']}: write a whole number, at least 1."
        facts = read_instances().types.get(kind)
        if "VolumeKmsKeyId" in resources and facts and facts.local_disk_bytes:
            yield (
                f"volume_kms_key on {kind}, whose own NVMe disks are always encrypted and take no key: remove it, or "
                "take a type without them."
            )
