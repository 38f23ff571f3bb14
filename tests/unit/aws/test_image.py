# SPDX-License-Identifier: Apache-2.0
"""An image is run by its digest, whatever its tag names tomorrow."""

import pytest

from llm_trainer.aws.image import parse_image, resolve_image
from llm_trainer.common.errors import UserError

HOST = "123456789012.dkr.ecr.us-west-2.amazonaws.com"


@pytest.mark.parametrize("text", ["sagemaker-llm-trainer:cuda", f"{HOST}/sagemaker-llm-trainer:cuda"])
def test_a_tag_becomes_a_digest(aws, text):
    digest = aws.furnish()
    assert resolve_image(text) == f"{HOST}/sagemaker-llm-trainer@{digest}"
    assert aws.list_arguments("DescribeImages")[0]["imageIds"] == [{"imageTag": "cuda"}]


def test_a_whole_digest_needs_no_request(aws):
    text = f"{HOST}/trainer@sha256:{'0' * 64}"
    assert resolve_image(text) == text
    assert aws.requests == []


def test_other_accounts_and_regions_are_asked():
    image = parse_image("999999999999.dkr.ecr-fips.us-gov-west-1.amazonaws.com/team/trainer")
    assert (image.account, image.region, image.repository, image.tag) == (
        *("999999999999", "us-gov-west-1"),
        *("team/trainer", "latest"),
    )


@pytest.mark.parametrize("text", ["sagemaker-llm-trainer:nothing", "other:cuda"])
def test_an_image_that_is_not_there(aws, text):
    aws.furnish()
    with pytest.raises(UserError, match=r"is not in ECR in us-west-2: push it"):
        resolve_image(text)


@pytest.mark.parametrize("text", ["ghcr.io/team/trainer:1", "localhost:5000/trainer", "Trainer", "a b", ""])
def test_an_image_from_elsewhere(text):
    with pytest.raises(UserError, match="is no image in ECR"):
        parse_image(text)
