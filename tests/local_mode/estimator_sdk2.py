# SPDX-License-Identifier: Apache-2.0
"""SDK 2's Estimator in local mode: python estimator_sdk2.py IMAGE CHANNELS_FOLDER JOB_FOLDER INSTANCES."""

import sys
from pathlib import Path

from sagemaker.estimator import Estimator
from sagemaker.local import LocalSession

from job import CHANNELS, HYPERPARAMETERS

image, channels, job_folder, instances = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

session = LocalSession()
session.config = {"local": {"local_code": True, "container_root": job_folder}}
estimator = Estimator(
    image_uri=image,
    role="arn:aws:iam::123456789012:role/SageMakerTraining",
    base_job_name="local-mode",
    instance_type="local",
    instance_count=instances,
    hyperparameters=HYPERPARAMETERS,
    output_path=f"file://{job_folder}",
    sagemaker_session=session,
)
estimator.fit({name: f"file://{channels / name}" for name in CHANNELS})
