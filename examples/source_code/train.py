# SPDX-License-Identifier: Apache-2.0
"""Runs the image's own training where an SDK insists on a script: SourceCode(source_dir=..., entry_script="train.py").

The settings are the job's hyperparameters, which the package reads itself: the arguments repeat them, less exactly.
Under torchrun (`distributed` of the ModelTrainer) the first process of a host trains, and the others wait for it.
"""

import sys

from llm_trainer.launcher.launch import launch

sys.exit(launch([]))
