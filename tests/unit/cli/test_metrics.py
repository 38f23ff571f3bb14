# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer metrics` prints the metric definitions for a person and for a program."""

import json
import subprocess
import sys

from llm_trainer.cli.metrics import print_definitions
from llm_trainer.common.metric_definitions import METRICS, OBJECTIVES, define_metrics


def test_json_is_what_create_training_job_takes(capsys):
    assert print_definitions("sft", [], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == define_metrics()


def test_a_person_sees_name_meaning_and_regex(capsys):
    assert print_definitions("sft", [], as_json=False) == 0
    *rows, objectives = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in rows] == list(METRICS)
    assert all(line.endswith(f"  {each['Regex']}") for line, each in zip(rows, define_metrics(), strict=True))
    assert all(f" {meaning} " in line for line, meaning in zip(rows, METRICS.values(), strict=True))
    assert objectives.endswith("eval_loss, train_loss, eval_mean_token_accuracy")
    assert set(OBJECTIVES) <= METRICS.keys()


def test_the_command_needs_no_torch():
    code = "import sys; from llm_trainer.cli.main import main; main(['metrics']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
