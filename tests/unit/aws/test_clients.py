# SPDX-License-Identifier: Apache-2.0
"""Clients come from boto3's own chain."""

import pytest
from botocore.exceptions import NoRegionError

from llm_trainer.aws.clients import find_known_region, find_region, find_role, open_client, split_uri


def test_a_role_by_name_is_one_of_this_account(aws):
    assert find_role("Trainer") == "arn:aws:iam::123456789012:role/Trainer"
    assert [asked.operation for asked in aws.requests] == ["GetCallerIdentity"]
    assert find_role("arn:aws:iam::1:role/x") == "arn:aws:iam::1:role/x"


def test_region_and_retries(aws, monkeypatch):
    assert open_client("s3").meta.region_name == find_region() == "us-west-2"
    assert open_client("ecr", "eu-west-1").meta.config.retries == {"total_max_attempts": 5, "mode": "adaptive"}
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(NoRegionError):
        find_region()


def test_the_region_is_known_without_asking(monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    assert find_known_region() is None
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert find_known_region() == "us-west-2"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert find_known_region() in (None, "us-west-2")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")  # as SageMaker sets it
    assert find_known_region() == "eu-west-3"


def test_an_address_in_s3():
    assert split_uri("s3://bucket/a/b/") == ("bucket", "a/b/")
    assert split_uri("s3://bucket") == ("bucket", "")
