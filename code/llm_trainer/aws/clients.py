# SPDX-License-Identifier: Apache-2.0
"""Clients of AWS's services. Region, profile, assumed roles and SSO are found by boto3's own chain.

boto3 takes a quarter of a second to import: it is imported where a command needs it.
"""

import os
from functools import cache
from typing import Any

# Of a request, not of a transfer. The adaptive mode waits longer, and asks less often, while AWS throttles.
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 20, 5
INVOKE_SECONDS = 65  # SageMaker itself waits 60 seconds for a model's answer


@cache  # reading a service's model takes a while
def open_client(service: str, region: str | None = None) -> Any:
    """Return a client of a service in a region, by default the one of the environment or the profile."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": ATTEMPTS, "mode": "adaptive"}
    read_seconds = INVOKE_SECONDS if service == "sagemaker-runtime" else READ_SECONDS
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=read_seconds, retries=retries)
    return boto3.Session().client(service, region_name=region, config=config)


def find_region() -> str:
    """Return the region of the environment or the profile. Raises botocore's NoRegionError where there is none."""
    import boto3
    from botocore.exceptions import NoRegionError

    region = boto3.Session().region_name
    if region is None:
        raise NoRegionError
    return region


def find_known_region() -> str | None:
    """Return the region of the SageMaker job here, else the one of the environment or the profile, None without one."""
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        return os.environ.get("AWS_REGION") or boto3.Session().region_name
    except BotoCoreError:  # a profile that is not there, or a broken file: nothing is asked of AWS
        return None


def find_role(role: str) -> str:
    """Return the ARN of a role that is given by its ARN or, in this account, by its name."""
    if role.startswith("arn:"):
        return role
    partition, account = open_client("sts").get_caller_identity()["Arn"].split(":")[1:5:3]
    return f"arn:{partition}:iam::{account}:role/{role}"


def split_uri(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an S3 address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
