# SPDX-License-Identifier: Apache-2.0
"""SDK 3's ModelTrainer with source code: python source_code_sdk3.py IMAGE CHANNELS_FOLDER JOB_FOLDER INSTANCES."""

import sys
from pathlib import Path

from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, SourceCode
from sagemaker.train.model_trainer import Mode

from job import CHANNELS, HYPERPARAMETERS

image, channels, job_folder, instances = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
source_dir = Path(__file__).parents[2] / "examples/source_code"
# An apostrophe ends the SDK's own driver in the container: it writes variables to a shell's file without escaping them.
hyperparameters = HYPERPARAMETERS | {"run_name": "the 1st run"}

trainer = ModelTrainer(
    training_mode=Mode.LOCAL_CONTAINER,
    training_image=image,
    base_job_name="local-mode",
    source_code=SourceCode(source_dir=str(source_dir), entry_script="train.py"),
    compute=Compute(instance_type="local_cpu", instance_count=instances),
    hyperparameters=hyperparameters,
    local_container_root=job_folder,
)
trainer.train(input_data_config=[InputData(channel_name=name, data_source=str(channels / name)) for name in CHANNELS])
