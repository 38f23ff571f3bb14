# SPDX-License-Identifier: Apache-2.0
"""What a tuning job compares its jobs by is a metric that this job will log."""

import pytest

from llm_trainer.common.metric_definitions import METRICS
from llm_trainer.config.schema import Settings
from llm_trainer.job.objective import find_objective_problems, find_objective_warnings, read_objective
from support.environments import build_environment


def find_problems(name, has_validation=True, **values):
    return list(find_objective_problems(name, "sft", Settings(**values).training, has_validation))


@pytest.mark.parametrize("text", ["eval_loss", '"eval_loss"'])
def test_the_objective_is_read_as_sagemaker_writes_it(text):
    assert read_objective(build_environment(hyperparameters={"_tuning_objective_metric": text})) == "eval_loss"


def test_a_job_outside_of_a_tuning_job_has_none():
    assert read_objective(build_environment()) is None
    assert find_problems(None, has_validation=False) == []
    assert list(find_objective_warnings(None)) == []


@pytest.mark.parametrize("name", [name for name in METRICS if name.startswith("eval_")])
def test_a_metric_of_evaluations_needs_them(name):
    (problem,) = find_problems(name, has_validation=False)
    assert problem.startswith(f"_tuning_objective_metric='{name}' needs validation data")
    (problem,) = find_problems(name, eval_strategy="no")
    assert problem.startswith(f"_tuning_objective_metric='{name}' with eval_strategy=no")
    assert find_problems(name) == find_problems(name, eval_strategy="steps") == []


def test_a_metric_of_the_training_needs_lines():
    (problem,) = find_problems("train_loss", logging_strategy="no")
    assert problem.startswith("_tuning_objective_metric='train_loss' with logging_strategy=no")
    assert find_problems("train_loss", has_validation=False) == []


def test_what_only_some_jobs_log_and_what_none_logs_is_told():
    (warning,) = find_objective_warnings("validation:loss")
    assert "is none of the metrics" in warning
    (warning,) = find_objective_warnings("mfu")
    assert warning == "_tuning_objective_metric='mfu' is logged only on a GPU whose peak is known, in 16 bit."
    assert list(find_objective_warnings("eval_loss")) == []
    assert find_problems("validation:loss", has_validation=False) == []  # their own expression may find it
