# SPDX-License-Identifier: Apache-2.0
"""The names that trackers take of projects, experiments and runs.

A tracker checks a name when its run begins, which is after the training has. The limits stand here, where a job is
checked; tests compare them with those of the pinned libraries. W&B's limits of names and groups are its server's.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llm_trainer.common.errors import cut_quote
from llm_trainer.config.sections import OutputSettings, TrackingSettings
from llm_trainer.config.tracker_choice import choose_trackers, find_mlflow_uri


class NameLimit(NamedTuple):
    """The limit of one of a tracker's names, and where a user gives that name. A setting wins over a variable."""

    tracker: str
    setting: str | None
    variable: str | None
    max_characters: int
    forbidden: str = ""  # characters that no such name may have
    pattern: str = "(?s:.*)"  # the whole name must match it


LIMITS = (
    NameLimit("wandb", "wandb_project", "WANDB_PROJECT", 128, "/\\#?%:"),
    NameLimit("wandb", "run_name", "WANDB_NAME", 128),
    NameLimit("wandb", None, "WANDB_RUN_ID", 128, ":;,#?/'", r"(?s:\S(.*\S)?)"),
    NameLimit("wandb", None, "WANDB_ENTITY", 128, "/\\#?%: "),
    NameLimit("wandb", None, "WANDB_RUN_GROUP", 128),
    NameLimit("wandb", None, "WANDB_JOB_TYPE", 64),
    NameLimit("wandb", None, "WANDB_TAGS", 64),
    NameLimit("mlflow", "mlflow_experiment_name", "MLFLOW_EXPERIMENT_NAME", 256),  # the width of its column
    NameLimit("mlflow", "run_name", "MLFLOW_RUN_NAME", 250),
    NameLimit("mlflow", None, "MLFLOW_RUN_ID", 256, "", r"[a-zA-Z0-9][\w-]*"),
    NameLimit("mlflow", None, "MLFLOW_EXPERIMENT_ID", 64, "", r"[a-zA-Z0-9][\w-]*"),
    NameLimit("registry", "mlflow_register_model", None, 256, "/:", r"(?s:(?!\.{1,2}$).*)"),
)
TITLES = {"wandb": "W&B", "mlflow": "MLflow", "registry": "MLflow's registry"}


def find_refused_names(
    tracking: TrackingSettings, output: OutputSettings, variables: Mapping[str, str] = os.environ
) -> Iterator[dict[str, str]]:
    """Yield each name that one of the job's trackers would refuse: its key, its value, the tracker and the fix."""
    targets = choose_trackers(tracking, variables) + ["registry"] * bool(find_mlflow_uri(tracking, variables))
    for limit in LIMITS:
        section = output if limit.setting in type(output).model_fields else tracking
        value = section.value(limit.setting) if limit.setting else None
        key = limit.setting if value else limit.variable
        value = value or variables.get(limit.variable or "")
        if limit.tracker in targets and key and value and not takes_name(limit, value):
            yield {
                "key": key,
                "value": cut_quote(value),
                "tracker": TITLES[limit.tracker],
                "fix": describe_limit(limit),
            }


def takes_name(limit: NameLimit, value: str) -> bool:
    """Tell whether the tracker takes this name, or each one of several tags."""
    names = value.split(",") if limit.variable == "WANDB_TAGS" else [value]
    return all(
        name.strip()
        and len(name) <= limit.max_characters
        and not set(limit.forbidden) & set(name)
        and re.fullmatch(limit.pattern, name)
        for name in names
    )


def describe_limit(limit: NameLimit) -> str:
    """Return the end of a sentence: what to give in place of a name that is refused."""
    rule = f"1 to {limit.max_characters} characters"
    if limit.forbidden:
        spaces = ", and no spaces" if " " in limit.forbidden else ""
        return f"give {rule} without {' '.join(limit.forbidden.strip())}{spaces}"
    if "a-z" in limit.pattern:
        return f"give {rule}: letters, digits, _ and -"
    return f"give {rule}"
