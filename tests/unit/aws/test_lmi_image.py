# SPDX-License-Identifier: Apache-2.0
"""AWS's LMI image has another account in some regions."""

import pytest
from botocore import session

from llm_trainer.aws.lmi_image import CUDA_13_HOST, TAG, choose_host, find_lmi_image
from llm_trainer.common.errors import UserError


def test_the_image_of_a_region():
    assert find_lmi_image("us-west-2") == f"763104351884.dkr.ecr.us-west-2.amazonaws.com/djl-inference:{TAG}"
    assert find_lmi_image("af-south-1").startswith("626614931356.dkr.ecr.af-south-1.amazonaws.com/")
    assert find_lmi_image("cn-north-1").startswith("727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/")


def test_a_region_that_is_not_known():
    with pytest.raises(UserError, match="not known in mars-1: give its URI there with --image"):
        find_lmi_image("mars-1")


@pytest.mark.parametrize(
    ("image", "needs"),
    [
        (f"djl-inference:{TAG}", True),
        ("djl-inference:0.38.0-lmi29.0.0-cu131-v1.0", True),
        ("djl-inference:0.36.0-lmi24.0.0-cu129", False),
        ("mine@sha256:" + "0" * 64, False),
    ],
)
def test_an_image_of_cuda_13_gets_a_host_that_runs_it(image, needs):
    kinds = session.get_session().get_service_model("sagemaker").shape_for("ProductionVariantInferenceAmiVersion").enum
    assert choose_host(image) == ({"InferenceAmiVersion": CUDA_13_HOST} if needs else {})
    assert CUDA_13_HOST in kinds
