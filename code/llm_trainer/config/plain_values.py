# SPDX-License-Identifier: Apache-2.0
"""The values that a setting may hold at all: plain JSON, with numbers and texts that programs and files can carry.

YAML and Python's literals know more: sets, bytes, keys of any kind, numbers without an end. They would fail later in a
library, or come out as another value.
"""

import math
from typing import Any

from llm_trainer.common.bounded_parsing import TooMuch, check_value

PATHS = (
    *("config", "model_id", "adapter_path", "chat_template_path", "train_dataset_path", "val_dataset_path"),
    *("output_dir", "checkpoint_dir"),
    "teacher_model_name_or_path",
)
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4000  # Linux: of a file's name, and of a path with room for names below it


def find_unusable_part(value: Any) -> str | None:
    """Return what a value holds that no setting can, as the rest of a sentence about it; None for a plain value."""
    try:
        check_value(value)
    except TooMuch as error:
        return f"it {error}"
    return find_odd_part(value)


def find_path_fault(value: Any) -> str | None:
    """Return why a text can be no path, as the rest of a sentence about it; None where it can, and for other values."""
    parts = value.encode("utf-8", "replace").split(b"/") if isinstance(value, str) else []
    if sum(map(len, parts)) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in parts):
        return "it is longer than any path: give one"
    return None


def find_odd_part(value: Any) -> str | None:
    """Return what a value of bounded size holds that JSON does not; None where it holds nothing of the kind."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"it has the key {key!r}, which is no text: put it in quotes"
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, float) and not math.isfinite(value):
        return "it holds a number that is not finite: write a finite one"
    if value is not None and not isinstance(value, dict | list | str | bool | int | float):
        return f"it holds a value of the kind {type(value).__name__}: put that in quotes, if a text is meant"
    return next((fault for part in parts if (fault := find_odd_part(part))), None)
