# SPDX-License-Identifier: Apache-2.0
"""The image of AWS's LMI container in a region: AWS keeps it in an account of its own there.

Source: `image_uri_config/djl-lmi.json` of sagemaker-core 2.27.0. It lists newer versions. The one here is the oldest
that `serving/lmi_files.py` writes for, and the one whose code was read for it.
"""

import json
import re
from pathlib import Path

from llm_trainer.common.errors import UserError

REGISTRIES = Path(__file__).with_name("lmi_registries.json")  # region -> account
TAG = "0.36.0-lmi27.0.0-cu130"
CUDA_13 = re.compile(r"[:.-]cu13\d")  # in a tag, as AWS writes it
# SageMaker's default host has an older driver, on which an image of CUDA 13 ends without a line in its log.
# Source: docs/get_started/using_dlcs.md of aws/deep-learning-containers.
CUDA_13_HOST = "al2023-ami-sagemaker-inference-gpu-4-1"


def find_lmi_image(region: str) -> str:
    """Return the URI of the LMI image in a region. Raises UserError for a region where it is not known."""
    account = json.loads(REGISTRIES.read_text(encoding="utf-8")).get(region)
    if account is None:
        raise UserError(f"AWS's LMI image is not known in {region}: give its URI there with --image.")
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{account}.dkr.ecr.{region}.{suffix}/djl-inference:{TAG}"


def choose_host(image: str) -> dict[str, str]:
    """Return what a production variant says of the hosts that an image needs, by its tag; nothing for the default."""
    return {"InferenceAmiVersion": CUDA_13_HOST} if CUDA_13.search(image) else {}
