# SPDX-License-Identifier: Apache-2.0
"""A setting holds plain JSON of bounded size, and nothing that would fail or change later."""

import datetime

import pytest

from llm_trainer.common.bounded_parsing import MAX_DEPTH
from llm_trainer.config.plain_values import find_path_fault, find_unusable_part


def nest(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


LOOP: dict = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (datetime.date(2024, 1, 1), "it holds a value of the kind date: put that in quotes, if a text is meant"),
        ({"a": [{1, 2}]}, "it holds a value of the kind set: put that in quotes, if a text is meant"),
        (b"x", "it holds a value of the kind bytes: put that in quotes, if a text is meant"),
        ({1: 2}, "it has the key 1, which is no text: put it in quotes"),
        ({None: 2}, "it has the key None, which is no text: put it in quotes"),
        (LOOP, f"it nests more than {MAX_DEPTH} lists and objects in each other"),
        (nest(MAX_DEPTH + 1), f"it nests more than {MAX_DEPTH} lists and objects in each other"),
        ([10**400], "it holds a whole number of more than 64 bits"),
        (float("nan"), "it holds a number that is not finite: write a finite one"),
        ({"a": float("inf")}, "it holds a number that is not finite: write a finite one"),
        ("a\0b", "it holds a text with a NUL character"),
        ({"a\0": 1}, "it holds a text with a NUL character"),
        ("\udcff", r"it holds half a character ('\udcff')"),
    ],
    ids=ascii,
)
def test_what_no_setting_can_hold_is_told(value, fault):
    assert find_unusable_part(value) == fault


@pytest.mark.parametrize("value", [None, True, 2**63, 1e-5, "é 🙂", [], {}, {"a": [1, {"b": None}]}, nest(20)])
def test_plain_values_are_fine(value):
    assert find_unusable_part(value) is None


@pytest.mark.parametrize(
    ("value", "is_path"), [("x" * 255, True), ("\u00e9" * 128, False), ("x/" * 4500, False), (5, True)]
)
def test_a_text_that_no_path_can_be_is_told(value, is_path):
    assert (find_path_fault(value) is None) == is_path
