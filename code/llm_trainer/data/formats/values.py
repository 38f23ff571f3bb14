# SPDX-License-Identifier: Apache-2.0
"""Values of a row's fields, whatever kind of file they come from."""

from typing import Any

from llm_trainer.data.formats.examples import Fields, RowError
from llm_trainer.readers.json import parse_json

LARGEST_EXACT = 2**53  # beyond it a float is no longer one whole number


def parse_text(fields: Fields, name: str) -> str:
    """Return a field's text. Raises RowError where it is missing, no text, or white space."""
    text = fields.get(name)
    if not isinstance(text, str) or not text.strip():
        kind = describe_value(text)
        raise RowError(f"field {name!r} is {kind} and not a text with something in it: fill or remove the row.")
    return text


def describe_value(value: Any) -> str:
    """Say in the words of JSON what kind of value it is."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if isinstance(value, str):
        return "a text" if value.strip() else "white space" if value else "an empty text"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def parse_json_text(value: Any) -> Any:
    """Parse a list or object that was stored as JSON text, as in CSV files; return any other value as it is.

    Raises RowError where the text is not valid JSON.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError as error:
            raise RowError(f"holds JSON text that is not valid ({error}): mend the text.") from error
    return value


def unify_value(value: Any) -> Any:
    """Return a value as each kind of file can hold it, without null fields and with whole numbers as integers.

    Parquet, Arrow and data sets of the Hub give each object of a column all fields, and each number of it one type.
    Raises RowError for a value that JSON does not have.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: unify_value(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [unify_value(element) for element in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT:
        return int(value)
    if not isinstance(value, int | float | None):  # bytes or a duration, which a template would write as <bytes>
        raise RowError(f"with a value that is {describe_value(value)}, which JSON does not have: write it as text.")
    return value
