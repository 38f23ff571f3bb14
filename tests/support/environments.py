# SPDX-License-Identifier: Apache-2.0
"""A host as a test wants to see it, without SageMaker's files."""

from pathlib import Path
from typing import Any

from llm_trainer.config.environment import Environment


def build_environment(**values: Any) -> Environment:
    """Return a job's only host, with two CPU cores and no GPU, but for these values of its fields."""
    defaults: dict[str, Any] = {
        "base_dir": Path("/opt/ml"),
        "hyperparameters": {},
        "channels": {},
        "sharded_channels": frozenset(),
        "hosts": ("algo-1",),
        "other_hosts": (),
        "current_host": "algo-1",
        "network_interface": None,
        "instance_type": None,
        "num_gpus": 0,
        "num_cpus": 2,
        "checkpoint_dir": Path("/opt/ml/checkpoints"),
    }
    return Environment(**(defaults | values))
