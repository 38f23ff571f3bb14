# SPDX-License-Identifier: Apache-2.0
"""SDK 3's ModelTrainer in local mode: python model_trainer_sdk3.py IMAGE CHANNELS_FOLDER JOB_FOLDER INSTANCES."""

import sys
from pathlib import Path

from sagemaker.core.training.configs import Compute, InputData
from sagemaker.train import ModelTrainer
from sagemaker.train.model_trainer import Mode

from job import CHANNELS, HYPERPARAMETERS

image, channels, job_folder, instances = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

trainer = ModelTrainer(
    training_mode=Mode.LOCAL_CONTAINER,
    training_image=image,
    base_job_name="local-mode",
    compute=Compute(instance_type="local_cpu", instance_count=instances),
    hyperparameters=HYPERPARAMETERS,
    local_container_root=job_folder,
)
trainer.train(input_data_config=[InputData(channel_name=name, data_source=str(channels / name)) for name in CHANNELS])
