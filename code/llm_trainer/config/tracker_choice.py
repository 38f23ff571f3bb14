# SPDX-License-Identifier: Apache-2.0
"""Which trackers a job has, from its settings and its environment, and the variables that tell their libraries so.

The reporter's process feeds them (reporter.py); the workers never import one.
"""

import netrc
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from llm_trainer.common.redaction import hide_secrets

if TYPE_CHECKING:  # settings.py asks this module what contradicts itself
    from llm_trainer.config.schema import Settings

TRACKERS = ("mlflow", "wandb", "tensorboard", "none")  # those that the image carries
MLFLOW_SCHEMES = ("", "file", "sqlite", "postgresql", "mysql", "mssql", "http", "https", "arn", "databricks")
SQLITE = "sqlite:///"
WANDB_HOST = "api.wandb.ai"


def choose_trackers(settings: "Settings", variables: Mapping[str, str] = os.environ) -> list[str]:
    """Those that `report_to` names, else those that are configured."""
    named = named_trackers(settings)
    if named is not None:
        return [name for name in named if name != "none"]
    configured = {
        "mlflow": find_mlflow_uri(settings, variables) is not None,
        "wandb": variables.get("WANDB_MODE") != "disabled" and has_wandb_account(settings, variables),
    }
    return [name for name, is_configured in configured.items() if is_configured]


def named_trackers(settings: "Settings") -> list[str] | None:
    """What the user gave as `report_to`; None where that was nothing. Its default, none, is Transformers'."""
    if "report_to" not in settings.given or settings.tracking.report_to is None:
        return None
    return (
        settings.tracking.report_to if isinstance(settings.tracking.report_to, list) else [settings.tracking.report_to]
    )


def find_mlflow_uri(settings: "Settings", variables: Mapping[str, str] = os.environ) -> str | None:
    """The setting's, MLflow's own variable's, or that of AWS's examples; a file's with its whole path."""
    uri = (
        settings.tracking.mlflow_uri
        or variables.get("MLFLOW_TRACKING_URI")
        or variables.get("MLFLOW_TRACKING_ARN")
        or None
    )
    if uri is None or ":" not in uri:
        return uri and str(Path(uri).absolute())
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def has_wandb_account(settings: "Settings", variables: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a key, or none is needed as nothing is sent; a workstation's may be in ~/.netrc."""
    if settings.tracking.wandb_token or variables.get("WANDB_API_KEY") or variables.get("WANDB_MODE") == "offline":
        return True
    try:
        return settings.tracking.wandb_project is not None and netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def find_tracking_contradictions(settings: "Settings") -> Iterator[str]:
    named = named_trackers(settings) or []
    if not set(named) <= set(TRACKERS):
        yield (
            f"report_to={settings.tracking.report_to!r} is not valid: it must be among {', '.join(TRACKERS)}; leave "
            "it out."
        )
    uri = find_mlflow_uri(settings)
    if "mlflow" in named and uri is None:
        yield f"report_to={settings.tracking.report_to!r} without an address: give mlflow_uri, or MLFLOW_TRACKING_URI."
    if uri is not None and urlsplit(uri).scheme.partition("+")[0] not in MLFLOW_SCHEMES:
        yield (
            f"mlflow_uri={hide_secrets(uri)!r} begins with nothing that MLflow knows: give http(s)://, sqlite:///, a "
            "folder, or the ARN of a SageMaker tracking server or MLflow app."
        )
    if "wandb" in named and not has_wandb_account(settings):
        yield (
            f"report_to={settings.tracking.report_to!r} without a W&B key: give WANDB_API_KEY in the job's "
            "Environment, or WANDB_MODE=offline."
        )
    if settings.tracking.track_model and not choose_trackers(settings):
        yield "track_model=true without a tracker: it would do nothing; give mlflow_uri or a W&B key, or remove it."


def find_idle_project(settings: "Settings") -> Iterator[str]:
    """A sentence where a project was given, and nothing will go there."""
    if settings.tracking.wandb_project and named_trackers(settings) is None and not has_wandb_account(settings):
        yield (
            f"wandb_project={settings.tracking.wandb_project!r} without a W&B key: W&B stays off; give WANDB_API_KEY "
            "in the job's Environment, or WANDB_MODE=offline."
        )


def tracker_variables(settings: "Settings", variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the trackers' libraries read. User and password of an address become variables of their own, so that no
    error's text can show them."""
    found = {
        "MLFLOW_EXPERIMENT_NAME": settings.tracking.mlflow_experiment_name,
        "WANDB_PROJECT": settings.tracking.wandb_project,
        "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3 takes a plain folder only so
    }
    uri = find_mlflow_uri(settings, variables)
    if uri is not None:
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https") and parts.username:
            found["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
            found["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
            uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        found["MLFLOW_TRACKING_URI"] = uri
    return {name: value for name, value in found.items() if value}


def configure_trackers(settings: "Settings") -> None:
    """Hide the trackers from a worker, but MLflow's registry where the result goes there.

    TRL and Transformers import them wherever they are installed, for seconds and 100 MB a rank; a None in `sys.modules`
    is Python's way to say that a module is not there. Call this before TRL is imported.
    """
    sys.modules["wandb"] = None  # type: ignore[assignment]
    if settings.output.mlflow_register_model:
        os.environ.update(tracker_variables(settings))
    else:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
