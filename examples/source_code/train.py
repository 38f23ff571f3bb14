# SPDX-License-Identifier: Apache-2.0
"""Runs the image's own training where an SDK insists on a script: SourceCode(source_dir=..., entry_script="train.py").

The settings are the job's hyperparameters, which the package reads itself: the arguments repeat them, less exactly.
"""

import os
import sys

from llm_trainer.common.errors import write_failure
from llm_trainer.config.environment import find_base_dir
from llm_trainer.launcher.launch import launch

if "LOCAL_RANK" in os.environ:
    reason = "This script was started by torchrun, which it starts itself: leave `distributed` out of the ModelTrainer."
    write_failure(find_base_dir() / "output", reason)
    sys.exit(reason)
sys.exit(launch([]))
