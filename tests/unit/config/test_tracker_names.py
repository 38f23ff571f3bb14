# SPDX-License-Identifier: Apache-2.0
"""A name that a tracker would refuse is refused before the job starts; W&B's pinned library has the same limits."""

import string

import pytest
import wandb
from pydantic import ValidationError
from wandb.errors import UsageError

from llm_trainer.config.schema import Settings
from llm_trainer.config.tracker_names import LIMITS, find_refused_names, takes_name

ONLINE = {"WANDB_API_KEY": "key", "MLFLOW_TRACKING_URI": "https://host"}
FIELDS_OF_WANDB = {"WANDB_PROJECT": "project", "WANDB_RUN_ID": "run_id", "WANDB_TAGS": "run_tags"}


def find_refused(variables=ONLINE, **values):
    settings = Settings(**values)
    return list(find_refused_names(settings.tracking, settings.output, variables))


@pytest.mark.parametrize(
    ("values", "variables"),
    [
        ({"wandb_project": "a/b"}, {}),
        ({"wandb_project": "a" * 129}, {}),
        ({"wandb_project": "  "}, {}),
        ({}, {"WANDB_PROJECT": "a:b"}),
        ({}, {"WANDB_RUN_ID": "a/b"}),
        ({}, {"WANDB_RUN_ID": " a"}),
        ({}, {"WANDB_TAGS": f"short,{'a' * 65}"}),
        ({}, {"WANDB_RUN_GROUP": "a" * 129}),
        ({}, {"WANDB_JOB_TYPE": "a" * 65}),
        ({}, {"WANDB_ENTITY": "my team"}),
        ({}, {"WANDB_NAME": "a" * 129}),
        ({"mlflow_experiment_name": "a" * 257}, {}),
        ({}, {"MLFLOW_RUN_ID": "a/b"}),
        ({"mlflow_register_model": "a/b"}, {}),
    ],
)
def test_a_refused_name_is_told_with_its_key(values, variables):
    (found,) = find_refused({**ONLINE, **variables}, **values)
    assert found["key"] in {**values, **variables}
    assert found["fix"].startswith("give 1 to ")


def test_a_run_name_has_to_suit_each_tracker():
    assert [found["tracker"] for found in find_refused(run_name="a" * 251)] == ["W&B", "MLflow"]
    assert [found["tracker"] for found in find_refused(run_name="a" * 200)] == ["W&B"]


@pytest.mark.parametrize(
    ("variables", "values"),
    [
        ({}, {"wandb_project": "a/b", "mlflow_experiment_name": "a" * 600}),  # nothing is sent
        (ONLINE, {"wandb_project": "a/b", "report_to": "mlflow"}),
        ({**ONLINE, "WANDB_PROJECT": "a/b"}, {"wandb_project": "a b (c)"}),  # the setting wins
        (ONLINE, {"wandb_project": "Ünicode", "run_name": "a: b/c", "mlflow_register_model": "my.model"}),
    ],
)
def test_other_names_are_taken(variables, values):
    assert find_refused(variables, **values) == []


@pytest.mark.parametrize("limit", [limit for limit in LIMITS if limit.variable in FIELDS_OF_WANDB])
def test_the_limits_are_those_of_the_library(limit):
    names = [f"a{character}b" for character in string.printable if character != "," or limit.variable != "WANDB_TAGS"]
    names += ["a" * length for length in (1, 64, 65, 128, 129) if limit.variable != "WANDB_RUN_ID"]
    for name in names:
        assert takes_name(limit, name) == is_taken_by_wandb(FIELDS_OF_WANDB[limit.variable], name), name


def is_taken_by_wandb(field, name):
    try:
        wandb.Settings(**{field: name})
    except (UsageError, ValidationError):
        return False
    return True
