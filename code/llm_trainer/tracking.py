# SPDX-License-Identifier: Apache-2.0
"""Which trackers a job reports to. Transformers' own callbacks do the reporting and import a tracker only then."""

import os

from llm_trainer.settings import Settings


def choose_trackers(settings: Settings) -> list[str]:
    """The trackers of `report_to`, or those that the settings configure."""
    if settings.report_to not in (None, "none"):
        return settings.report_to if isinstance(settings.report_to, list) else [settings.report_to]
    configured = {"mlflow": settings.mlflow_uri, "wandb": settings.wandb_project or settings.wandb_token}
    return [name for name, value in configured.items() if value]


def configure_trackers(settings: Settings) -> None:
    """Hand the settings to the trackers the way they read them: by environment variables."""
    variables = {
        "MLFLOW_TRACKING_URI": settings.mlflow_uri,
        "MLFLOW_EXPERIMENT_NAME": settings.mlflow_experiment_name,
        "WANDB_PROJECT": settings.wandb_project,
    }
    os.environ.update({name: value for name, value in variables.items() if value})
