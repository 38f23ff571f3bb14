# SPDX-License-Identifier: Apache-2.0
"""The value that the user wrote, decoded from the text of a hyperparameter.

SageMaker hands every value over as a string, and each client writes that string in its own way:

- The API and the command line write it as it is ("10", "x").
- SDK v2 with a source folder, and ModelTrainer, write JSON ("true", "\\"x\\"", "[1, 2]").
- SDK v2's plain Estimator writes Python's str() ("True", "None", "['a', 1]").
"""

import ast
import json
import re
from typing import Any

# Matches a list of names, and no regular expression such as `(q|v)_proj.{1,2}`.
COMMA_SEPARATED_NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")


def decode_value(text: str, types: frozenset[str], nullable: bool) -> Any:
    """Return the value that a text stands for in a field of these plain types, or the text where it stands for none.

    Only a value of one of the types is taken. In a field for strings, "007" stays a string; in another it is a number.
    The range of a value is not checked.
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
    """Return the text read as JSON, else as a Python literal, else NO_LITERAL."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return NO_LITERAL


def is_of_type(value: Any, types: frozenset[str]) -> bool:
    """Tell whether the value is of one of the types. A whole number is a float, too, where no string is possible."""
    name = type(value).__name__
    return name in types or (name == "int" and "float" in types and "str" not in types)
