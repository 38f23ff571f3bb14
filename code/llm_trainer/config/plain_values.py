# SPDX-License-Identifier: Apache-2.0
"""The values that a setting may hold at all: plain JSON, with numbers and texts that programs and files can carry.

YAML and Python's literals know more: sets, bytes, keys of any kind, numbers without an end. They would fail later in a
library, or come out as another value.
"""

import math
from typing import Any

from llm_trainer.common.bounded_parsing import TooMuch, check_value


def find_unusable_part(value: Any) -> str | None:
    """Return what a value holds that no setting can, as the rest of a sentence about it; None for a plain value."""
    try:
        check_value(value)
    except TooMuch as error:
        return f"it {error}"
    return find_odd_part(value)


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
