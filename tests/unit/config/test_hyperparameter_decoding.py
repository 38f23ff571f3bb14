# SPDX-License-Identifier: Apache-2.0
"""Every client's way of writing a value gives the value back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_trainer.config.hyperparameter_decoding import decode_value

BOOL, INT, FLOAT, STR = frozenset({"bool"}), frozenset({"int"}), frozenset({"float"}), frozenset({"str"})
NAMES_OR_TEXT, OBJECT_OR_TEXT = frozenset({"list", "str"}), frozenset({"dict", "str"})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.booleans())
def test_booleans_of_every_client(value):
    assert decode_value(str(value), BOOL, False) is value  # SDK v2 plain
    assert decode_value(json.dumps(value), BOOL, False) is value  # SDK v2 with sources, ModelTrainer
    assert decode_value(json.dumps(str(value)), BOOL, False) is value  # a string that the user passed, JSON-encoded


@given(st.integers())
def test_whole_numbers_of_every_client(value):
    assert decode_value(str(value), INT, False) == value
    assert decode_value(json.dumps(str(value)), INT, False) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_every_client(value):
    assert decode_value(str(value), FLOAT, False) == value
    assert decode_value(json.dumps(value), FLOAT, False) == value


@given(st.text().filter(lambda text: not text.startswith('"')))
def test_texts_of_every_client(value):
    assert decode_value(value, STR, False) == value
    assert decode_value(json.dumps(value), STR, False) == value


@given(st.lists(st.from_regex(r"[a-z_]+", fullmatch=True), min_size=1))
def test_lists_of_every_client(value):
    assert decode_value(str(value), NAMES_OR_TEXT, False) == value
    assert decode_value(json.dumps(value), NAMES_OR_TEXT, False) == value
    assert decode_value(json.dumps(json.dumps(value)), NAMES_OR_TEXT, False) == value
    if len(value) > 1:
        assert decode_value(",".join(value), NAMES_OR_TEXT, False) == value


@given(st.dictionaries(st.text(), json_values))
def test_objects_of_every_client(value):
    assert decode_value(str(value), OBJECT_OR_TEXT, True) == value
    assert decode_value(json.dumps(value), OBJECT_OR_TEXT, True) == value


@pytest.mark.parametrize("text", ["null", "None", '"null"', '"None"', ""])
def test_nothing_is_null_where_null_is_allowed(text):
    assert decode_value(text, STR, True) is None


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("007", STR, "007"),
        ("10", STR, "10"),
        ("1e-05", FLOAT, 1e-05),
        ("true", STR, "true"),
        ("all-linear", NAMES_OR_TEXT, "all-linear"),
        (r".*\.(q|v)_proj", NAMES_OR_TEXT, r".*\.(q|v)_proj"),
        ("q_proj, v_proj", NAMES_OR_TEXT, ["q_proj", "v_proj"]),
        ("linear", OBJECT_OR_TEXT, "linear"),
    ],
)
def test_the_field_decides_what_a_text_means(text, types, value):
    assert decode_value(text, types, False) == value


@given(st.text())
def test_any_text_decodes_to_something(text):
    for types in (BOOL, INT, FLOAT, STR, NAMES_OR_TEXT, OBJECT_OR_TEXT):
        decode_value(text, types, True)
