# SPDX-License-Identifier: Apache-2.0
"""The choice of a job's trackers, from its settings and its environment, and the variables that their libraries read.

One process a job, the reporter, feeds the trackers. The workers never import one.
"""

import netrc
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llm_trainer.config.sections import OutputSettings, TrackingSettings

TRACKERS = ("mlflow", "wandb", "tensorboard", "none")  # the image carries these
MLFLOW_SCHEMES = ("", "file", "sqlite", "postgresql", "mysql", "mssql", "http", "https", "arn", "databricks")
# Those that the pinned sagemaker-mlflow takes; it fails on others at its first request, some by an IndexError.
MLFLOW_ARN = re.compile(r"arn:(aws|aws-us-gov):sagemaker:[\w-]+:\d+:(mlflow-tracking-server|mlflow-app)/[\w-]+")
SQLITE, FILE = "sqlite:///", "file:"
WANDB_HOST = "api.wandb.ai"
# These import trackers wherever they are installed, once they are imported themselves.
TRACKER_IMPORTERS = ("transformers", "trl")


def choose_trackers(settings: TrackingSettings, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the trackers that `report_to` names, else those that the settings or variables configure."""
    named = list_named_trackers(settings)
    if named is not None:
        return [name for name in named if name != "none"]
    configured = {
        "mlflow": find_mlflow_uri(settings, variables) is not None,
        "wandb": variables.get("WANDB_MODE") != "disabled" and has_wandb_account(settings, variables),
    }
    return [name for name, is_configured in configured.items() if is_configured]


def list_named_trackers(settings: TrackingSettings) -> list[str] | None:
    """Return what the user gave as `report_to`, or None where the user gave nothing.

    Its default says "none", which is Transformers' word and not the user's.
    """
    if not settings.is_given("report_to") or settings.report_to is None:
        return None
    return settings.report_to if isinstance(settings.report_to, list) else [settings.report_to]


def find_mlflow_uri(settings: TrackingSettings, variables: Mapping[str, str] = os.environ) -> str | None:
    """Return the address of MLflow's server, or None; a file's or folder's has its absolute path.

    The setting wins over MLflow's own variable, and that over the variable of AWS's examples.
    """
    uri = settings.mlflow_uri or variables.get("MLFLOW_TRACKING_URI") or variables.get("MLFLOW_TRACKING_ARN") or None
    if uri is None or ":" not in uri:
        return uri and str(Path(uri).absolute())
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    if uri.startswith(FILE) and not uri.startswith(f"{FILE}/"):
        return f"{FILE}{Path(uri.removeprefix(FILE)).absolute()}"
    return uri


def is_mlflow_address(uri: str) -> bool:
    """Tell whether MLflow knows the scheme of an address, and SageMaker's plugin the kind of an ARN."""
    scheme = urlsplit(uri).scheme.partition("+")[0]
    return scheme in MLFLOW_SCHEMES and (scheme != "arn" or MLFLOW_ARN.fullmatch(uri) is not None)


def has_wandb_account(settings: TrackingSettings, variables: Mapping[str, str] = os.environ) -> bool:
    """Tell whether there is a key for W&B, or none is needed since nothing is sent.

    A workstation may keep its key in ~/.netrc, which counts where a project is given.
    """
    if settings.wandb_token or variables.get("WANDB_API_KEY") or variables.get("WANDB_MODE") == "offline":
        return True
    try:
        return settings.wandb_project is not None and netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def find_idle_project(settings: TrackingSettings) -> Iterator[str]:
    """Yield a sentence where a W&B project is given, and nothing will be sent to it."""
    if settings.wandb_project and list_named_trackers(settings) is None and not has_wandb_account(settings):
        yield (
            f"wandb_project={settings.wandb_project!r} without a W&B key: W&B stays off; give WANDB_API_KEY "
            "in the job's Environment, or WANDB_MODE=offline."
        )


def build_tracker_variables(settings: TrackingSettings, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables that the libraries of the trackers read.

    User and password of an address become variables of their own. The text of an error can then show neither. Paths
    are absolute: the reporter has a working folder of its own.
    """
    found = {
        "MLFLOW_EXPERIMENT_NAME": settings.mlflow_experiment_name,
        "WANDB_PROJECT": settings.wandb_project,
        "WANDB_DIR": os.path.abspath(folder) if (folder := variables.get("WANDB_DIR")) else None,
        "MLFLOW_ALLOW_FILE_STORE": "true",  # without it, MLflow 3 refuses a plain folder
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


def configure_trackers(tracking_settings: TrackingSettings, output_settings: OutputSettings) -> None:
    """Hide the trackers' libraries from a worker, except MLflow's where the result goes to its registry.

    Transformers and TRL import every tracker that is installed, for seconds and 100 MB a rank, and have no switch
    against it. A None in `sys.modules` is Python's way to say that a module is not there. This works only before
    these libraries are imported: raises RuntimeError when it is too late.
    """
    too_late = [name for name in TRACKER_IMPORTERS if name in sys.modules]
    if too_late:
        raise RuntimeError(f"Trackers must be hidden before {' and '.join(too_late)} is imported.")
    sys.modules["wandb"] = None  # type: ignore[assignment]
    if output_settings.mlflow_register_model:
        os.environ.update(build_tracker_variables(tracking_settings))
    else:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
