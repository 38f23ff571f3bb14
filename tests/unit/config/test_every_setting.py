# SPDX-License-Identifier: Apache-2.0
"""Every setting, written down by every client, comes back as the value that the user meant."""

import ast
import json
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import SecretStr

from llm_trainer.config.load import read_settings
from llm_trainer.config.plain_values import find_unusable_part
from llm_trainer.config.rules.table import list_best_metrics
from llm_trainer.config.schema import FIELDS, list_plain_types, split_union
from llm_trainer.config.tracker_choice import TRACKERS
from support.environments import build_environment

# Names, paths, addresses, regular expressions, and texts that look like something else.
REAL_TEXTS = [
    "all-linear",
    "/opt/ml/x",
    "https://host/a?b=c",
    r".*\.(q|v)_proj",
    "007",
    "1e-4",
    "true",
    "a b",
    "[1]",
    "{}",
]
TEXTS = st.sampled_from(REAL_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NAMES = st.from_regex(r"[A-Za-z_][\w.-]{0,9}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)

ENVIRONMENT = build_environment()


def values_of(name: str) -> SearchStrategy[Any]:
    """Valid values of a setting, by its annotation and its bounds."""
    if name == "report_to":
        return st.sampled_from([*TRACKERS, None, ["mlflow", "wandb"]])
    if name == "metric_for_best_model":
        return st.sampled_from(list_best_metrics("sft"))
    field = FIELDS[name]
    bounds = {
        key: getattr(rule, key) for rule in field.metadata for key in ("ge", "gt", "lt", "le") if hasattr(rule, key)
    }
    values = st.one_of([values_of_type(part, bounds) for part in split_union(field.annotation)])
    return values.filter(lambda value: find_unusable_part(value) is None)  # no NUL, no more than 64 bits


def values_of_type(kind: Any, bounds: dict[str, float]) -> SearchStrategy[Any]:
    lowest, highest = bounds.get("ge", bounds.get("gt")), bounds.get("lt", bounds.get("le"))
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return st.sampled_from(typing.get_args(kind))
    if origin is int:
        first = None if lowest is None else math.floor(lowest) + ("gt" in bounds)
        return st.integers(first, None if highest is None else math.ceil(highest) - 1)
    if origin is float:
        options = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
        return st.floats(lowest, highest, allow_nan=False, allow_infinity=False, **options)
    if origin is list:
        (element,) = typing.get_args(kind)
        elements = NAMES if element is str else values_of_type(element, {})
        return st.lists(elements, min_size=1, max_size=3)
    if origin is dict:
        _, values = typing.get_args(kind) or (str, None)
        return st.dictionaries(NAMES, values_of_type(values, {"gt": 0}) if values else JSON, max_size=3)
    return {
        Any: JSON,
        bool: st.booleans(),
        str: TEXTS,
        SecretStr: TEXTS,
        type(None): st.none(),
    }[origin]


def as_typed(value: Any) -> str:
    """What a person types at a command line or in a console."""
    if isinstance(value, list) and len(value) > 1:
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


ENCODINGS: dict[str, Callable[[Any], str]] = {
    "SDK v2 with a source folder": json.dumps,
    "SDK v2 without": str,
    "ModelTrainer": lambda value: value if isinstance(value, str) else json.dumps(value),
    "typed": as_typed,
    "JSON twice": lambda value: json.dumps(json.dumps(value)),
    "a text, as JSON": lambda value: json.dumps(str(value)),
}


def is_ambiguous(value: Any, name: str) -> bool:
    """Whether a text is written as a client, or a person, writes another value of the same setting."""
    if not isinstance(value, str):
        return False
    types, nullable = list_plain_types(name)
    if nullable and value in ("None", "null", ""):
        return True  # no value is written like that
    if "list" in types and "," in value:
        return True  # a list of names is written like that
    try:
        meant = ast.literal_eval({"true": "True", "false": "False"}.get(value, value.strip()))
    except (ValueError, SyntaxError):
        return False
    # A text in quotes is what json.dumps makes of the text without them. And where a setting takes texts and values of
    # another type ("true" in one of bool | str), what reads as such a value is one.
    return isinstance(meant, str) or type(meant).__name__ in types


def read_back(name: str, text: str) -> Any:
    values, problems = read_settings(ENVIRONMENT, {name: text})
    assert not [problem for problem in problems if problem.startswith(f"{name}={text!r} is not valid")]
    value = values.value(name)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "config"])  # which names a file
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_clients_way_of_writing_it(name, data):
    value = data.draw(values_of(name))
    assume(not is_ambiguous(value, name))
    for client, write in ENCODINGS.items():
        back = read_back(name, write(value))
        assert back == value, f"{client}: {write(value)}"
        assert isinstance(back, bool) == isinstance(value, bool)
