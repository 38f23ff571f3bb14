# SPDX-License-Identifier: Apache-2.0
"""Which trackers a job reports to. Transformers' own callbacks do the reporting and import a tracker only then."""

import os
import sys

from llm_trainer.settings import Settings


def choose_trackers(settings: Settings) -> list[str]:
    """The trackers of `report_to`, or those that the settings configure."""
    if settings.report_to not in (None, "none"):
        return settings.report_to if isinstance(settings.report_to, list) else [settings.report_to]
    configured = {"mlflow": settings.mlflow_uri, "wandb": settings.wandb_project or settings.wandb_token}
    return [name for name, value in configured.items() if value]


def configure_trackers(settings: Settings) -> None:
    """Hand the settings to the trackers the way they read them, by environment variables, and hide W&B if not used.

    TRL imports wandb wherever it is installed, for half a second and 60 MB a rank; a None in `sys.modules` is Python's
    way to say that a module is not there. Call this before TRL is imported.
    """
    if "wandb" not in choose_trackers(settings):
        sys.modules["wandb"] = None  # type: ignore[assignment]
    variables = {
        "MLFLOW_TRACKING_URI": settings.mlflow_uri,
        "MLFLOW_EXPERIMENT_NAME": settings.mlflow_experiment_name,
        "WANDB_PROJECT": settings.wandb_project,
    }
    os.environ.update({name: value for name, value in variables.items() if value})
