# SPDX-License-Identifier: Apache-2.0
"""AWS's LMI image has another account in some regions."""

import pytest

from llm_trainer.aws.lmi_image import TAG, find_lmi_image
from llm_trainer.common.errors import UserError


def test_the_image_of_a_region():
    assert find_lmi_image("us-west-2") == f"763104351884.dkr.ecr.us-west-2.amazonaws.com/djl-inference:{TAG}"
    assert find_lmi_image("af-south-1").startswith("626614931356.dkr.ecr.af-south-1.amazonaws.com/")
    assert find_lmi_image("cn-north-1").startswith("727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/")


def test_a_region_that_is_not_known():
    with pytest.raises(UserError, match="not known in mars-1: give its URI there with --image"):
        find_lmi_image("mars-1")
