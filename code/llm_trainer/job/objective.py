# SPDX-License-Identifier: Apache-2.0
"""The metric that automatic model tuning asks of a job: it must be one that the job will log."""

from collections.abc import Iterator

from llm_trainer.common.metric_definitions import CONDITIONAL_METRICS, list_all_names, list_metrics
from llm_trainer.config.environment import Environment
from llm_trainer.config.hyperparameter_decoding import decode_value
from llm_trainer.config.sections import TrainingSettings

OBJECTIVE = "_tuning_objective_metric"  # the hyperparameter in which SageMaker names it


def read_objective(environment: Environment) -> str | None:
    """Return the name of the metric that a tuning job compares its jobs by, or None outside of one."""
    value = environment.hyperparameters.get(OBJECTIVE)
    return str(decode_value(str(value), frozenset({"str"}), nullable=True)) if value else None


def find_objective_problems(
    name: str | None, method: str, settings: TrainingSettings, has_validation: bool
) -> Iterator[str]:
    """Yield a sentence where one of our metrics is the objective, and this job will never log it.

    A tuning job would fail for the want of it, after all its jobs have been paid for.
    """
    if name not in list_all_names():
        return
    if name not in list_metrics(method):
        yield f"{OBJECTIVE}={name!r} with method={method}: it is never logged; `llm-trainer metrics` lists what is."
    elif not name.startswith("eval_"):
        if settings.logging_strategy == "no":
            yield f"{OBJECTIVE}={name!r} with logging_strategy=no: it is never logged; remove logging_strategy."
    elif not has_validation:
        yield f"{OBJECTIVE}={name!r} needs validation data and there is none: give a channel 'validation'."
    elif settings.is_given("eval_strategy") and settings.eval_strategy == "no":
        yield f"{OBJECTIVE}={name!r} with eval_strategy=no: it is never logged; remove eval_strategy."


def find_objective_warnings(name: str | None) -> Iterator[str]:
    """Yield a sentence where it depends on more than the settings whether the objective is logged."""
    if name is not None and name not in list_all_names():
        yield (
            f"{OBJECTIVE}={name!r} is none of the metrics that `llm-trainer metrics` lists: a regular expression of "
            "yours has to find it in the log."
        )
    elif name in CONDITIONAL_METRICS:
        yield f"{OBJECTIVE}={name!r} is logged only {CONDITIONAL_METRICS[name]}."
