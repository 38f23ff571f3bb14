# SPDX-License-Identifier: Apache-2.0
"""Redaction of secrets in a log, a report or a tracker. Imports nothing heavy, since every process needs it."""

import os
import re
from collections.abc import Iterable
from typing import Any

REDACTED = "***"
URL_PASSWORD = re.compile(r"""(?<=://)[^/@\s"'<>]+(?=@)""")  # a tracking server's, say, with the user's name
# These variables hold a secret in plain text.
SECRET_VARIABLES = (
    "HF_TOKEN",
    "LLM_TRAINER_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)


def hide_secrets(text: str, others: Iterable[str] = ()) -> str:
    """Return the text without passwords in addresses, secrets of this process's environment, and `others`."""
    for secret in filter(None, [*(os.environ.get(name) for name in SECRET_VARIABLES), *others]):
        text = text.replace(secret, REDACTED)
    return URL_PASSWORD.sub(REDACTED, text)


def hide_in(value: Any) -> Any:
    """Return a value for JSON, with the secrets in all its texts hidden."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: hide_in(each) for key, each in value.items()}
    return [hide_in(each) for each in value] if isinstance(value, list | tuple) else value
