# SPDX-License-Identifier: Apache-2.0
"""What every script here trains with: values of each kind a user may pass, which each SDK encodes in its own way."""

CHANNELS = ("train", "validation", "model", "config")
HYPERPARAMETERS = {
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "lora_r": "4",
    "lora_dropout": 0,
    "use_peft": True,
    "packing": False,
    "run_name": "it's the 1st run",
    "mlflow_uri": None,
    "target_modules": ["q_proj", "v_proj"],
    "lr_scheduler_kwargs": {},
}
