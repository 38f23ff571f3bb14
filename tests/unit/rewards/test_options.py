# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.rewards.options import OPTIONS, find_column_problems, find_option_problems, suggest


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("exact_match", {}),
        ("exact_match", {"column": "target", "extract": "(x)", "ignore_case": True}),
        ("math", {"extract": "#### (.+)"}),
        ("regex", {"pattern": "x"}),
        ("json_schema", {"schema": {}}),
        ("json_schema", {"schema": "answer.json"}),
        ("length", {"max_tokens": 10, "buffer": 0}),
        ("length", {"target_characters": 10}),
    ],
)
def test_right_options_have_no_problem(name, options):
    assert list(find_option_problems(name, options)) == []


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("regex", {"patern": "x", "pattern": "x"}, "regex has no option 'patern': the nearest is 'pattern'."),
        ("regex", {}, "regex lacks its option 'pattern', a text: add it."),
        ("regex", {"pattern": ""}, 'regex: pattern="" has to be a text: change it.'),
        ("exact_match", {"ignore_case": 1}, "exact_match: ignore_case=1 has to be true or false: change it."),
        ("length", {"max_tokens": True}, "length: max_tokens=true has to be a whole number above 0: change it."),
        ("length", {"max_tokens": 0}, "length: max_tokens=0 has to be a whole number above 0: change it."),
        ("length", {"max_tokens": 1.5}, "length: max_tokens=1.5 has to be a whole number above 0: change it."),
        (
            "length",
            {},
            "length has no bound: give one of max_tokens, max_characters, target_tokens, target_characters.",
        ),
        (
            "length",
            {"max_tokens": 1, "target_tokens": 1},
            "length has max_tokens and target_tokens: give one of max_tokens, max_characters, target_tokens, "
            "target_characters.",
        ),
        (
            "length",
            {"target_tokens": 9, "buffer": 1},
            "length: buffer=1 goes with a maximum and not with target_tokens: leave it out.",
        ),
        ("length", {"max_tokens": 9, "buffer": 10}, "length: buffer=10 has to be at most max_tokens=9: lower it."),
        (
            "json_schema",
            {"schema": True},
            "json_schema: schema=true has to be a JSON Schema, or the name of a file with one in a channel: change it.",
        ),
    ],
)
def test_a_wrong_option_is_told(name, options, sentence):
    assert list(find_option_problems(name, options)) == [f"reward_options: {sentence}"]


def test_a_column_to_compare_with_has_to_be_there():
    for name in OPTIONS:
        assert list(find_column_problems(name, {}, ["answer", "level"])) == []
    assert list(find_column_problems("math", {}, ["level"])) == [
        "reward_functions='math' needs the column 'solution' or 'answer', and the rows have level: add it, or name "
        'another by reward_options={"math": {"column": "NAME"}}.'
    ]
    (problem,) = find_column_problems("exact_match", {"column": "target"}, ["answer"])
    assert "needs the column 'target', and the rows have answer" in problem
    assert list(find_column_problems("length", {}, [])) == []


def test_an_unknown_name_gets_the_nearest_or_all():
    assert suggest("exact_mach", OPTIONS) == "the nearest is 'exact_match'."
    assert suggest("zzz", ["a", "b"]) == "give one of a, b."
