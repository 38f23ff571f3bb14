# SPDX-License-Identifier: Apache-2.0
"""Each request has an IAM action, and each operation is one of boto3's."""

import botocore.session
import pytest

from llm_trainer.aws.permissions import PERMISSIONS, find_action

SERVICES = {
    "sagemaker": ("sagemaker", "sagemaker-runtime"),
    "s3": ("s3",),
    "ecr": ("ecr",),
    "logs": ("logs",),
    "sts": ("sts",),
}


@pytest.mark.parametrize("operation", PERMISSIONS)
def test_the_operation_is_one_of_the_service(operation):
    session = botocore.session.get_session()
    services = SERVICES[PERMISSIONS[operation].action.partition(":")[0]]
    assert any(operation in session.get_service_model(service).operation_names for service in services)


def test_an_operation_of_nobody_stands_for_itself():
    assert find_action("HeadObject") == "s3:GetObject"
    assert find_action("ListBuckets") == "ListBuckets"
