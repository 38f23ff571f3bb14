# SPDX-License-Identifier: Apache-2.0
"""Every choice of every enumerated setting is refused by `validate`, or trains two steps and is exported."""

import json
import os
import subprocess
import sys

import pytest

from support import every_choice

NO_LINES = ["logging_strategy=no"]  # a choice that asks for none


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_choice_is_refused_before_the_start_or_trains(tree):
    tree.change(max_steps="2", sample_prompts="0", per_device_train_batch_size="4")
    variables = {
        **os.environ,
        **tree.environment,
        "SAGEMAKER_BASE_DIR": str(tree.base_dir),
        "OMP_NUM_THREADS": "1",
        "LLM_TRAINER_CACHE": str(tree.base_dir / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, every_choice.__file__]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(list(every_choice.list_choices())), result.stderr
    wrong = [
        outcome
        for outcome in outcomes
        if outcome["outcome"] not in ("refused", "trained") and outcome["choice"] not in NO_LINES
    ]
    assert not wrong, "\n".join("{choice} {outcome} {text}".format(**outcome) for outcome in wrong)
