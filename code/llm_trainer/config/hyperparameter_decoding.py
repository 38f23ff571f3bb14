# SPDX-License-Identifier: Apache-2.0
"""Turns the text of a hyperparameter back into the value that the user wrote.

SageMaker hands every value over as a string, and each client writes that string its own way: the API and the command
line as it is ("10", "x"), SDK v2 with a source folder and ModelTrainer as JSON ("true", "\\"x\\"", "[1, 2]"), SDK v2's
plain Estimator as Python's str() ("True", "None", "['a', 1]").
"""

import ast
import json
import re
from typing import Any

# A list of names, and not a regular expression such as `(q|v)_proj.{1,2}`.
COMMA_SEPARATED_NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")


def decode_value(text: str, types: frozenset[str], nullable: bool) -> Any:
    """The value that `text` stands for in a field of these plain types; `text` itself where it stands for none.

    Only a value of one of the types is taken, so that "007" stays a string where a string is asked for and becomes
    a number where a number is. Whether the value is in range is for the settings to say.
    """
    value = parse_literal(text)
    if isinstance(value, str):  # a string quoted by json.dumps, perhaps round another value: "\"10\""
        text, value = value, parse_literal(value)
    if value is None and (nullable or "str" not in types):
        return None
    if text == "" and nullable:
        return None
    if is_of_type(value, types):
        return value
    if "list" in types and ("str" not in types or COMMA_SEPARATED_NAMES.fullmatch(text)):
        return [part.strip() for part in text.split(",")]
    if "str" in types:
        return text
    return text if value is NO_LITERAL else value


NO_LITERAL = object()


def parse_literal(text: str) -> Any:
    """`text` read as JSON, else as a Python literal, else NO_LITERAL."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return NO_LITERAL


def is_of_type(value: Any, types: frozenset[str]) -> bool:
    """Whether the value is of one of the types; a whole number also serves where a float is asked for."""
    name = type(value).__name__
    return name in types or (name == "int" and "float" in types and "str" not in types)
