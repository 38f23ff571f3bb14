# SPDX-License-Identifier: Apache-2.0
import pytest
from trl.rewards import accuracy_reward, get_soft_overlong_punishment

from llm_trainer.common.errors import UserError
from llm_trainer.rewards.built_in import BUILDERS, Completion, read_text
from llm_trainer.rewards.options import OPTIONS

SCHEMA = {
    "type": "object",
    "required": ["a"],
    "properties": {"a": {"$ref": "#/$defs/n"}},
    "$defs": {"n": {"type": "integer"}},
}


def judge(name, text, options=None, num_tokens=0, **row):
    return BUILDERS[name](**(options or {}))(Completion(text, num_tokens, row))


def test_each_built_in_has_its_options():
    assert BUILDERS.keys() == OPTIONS.keys()


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([{"role": "assistant", "content": "call"}, {"role": "tool", "content": "2"}, {"content": "last"}], "last"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": None}], ""),
        ([], ""),
    ],
)
def test_the_text_of_a_completion_is_its_last_message(completion, text):
    assert read_text(completion) == text


@pytest.mark.parametrize(
    ("text", "options", "row", "reward"),
    [
        (" Paris\n", {}, {"solution": "Paris"}, 1.0),
        ("paris", {}, {"solution": "Paris"}, 0.0),
        ("STRASSE", {"ignore_case": True}, {"solution": "straße"}, 1.0),
        ("42", {}, {"answer": 42}, 1.0),
        ("42", {}, {"solution": None, "answer": "42"}, 1.0),
        ("42", {}, {"solution": "41", "answer": "42"}, 0.0),
        ("b", {"column": "target"}, {"solution": "a", "target": "b"}, 1.0),
        ("b", {}, {"solution": None}, None),
        ("no answer", {"extract": "<answer>(.*?)</answer>"}, {"solution": "b"}, 0.0),
        ("<answer>a</answer><answer> b </answer>", {"extract": "<answer>(.*?)</answer>"}, {"solution": "b"}, 1.0),
        ("so #### 7", {"extract": r"#### (-?\d+)"}, {"answer": "3 + 4 = 7\n#### 7"}, 1.0),
        ("a", {"extract": "(x)?a"}, {"answer": "7"}, 0.0),
    ],
)
def test_exact_match(text, options, row, reward):
    assert judge("exact_match", text, options, **row) == reward


@pytest.mark.parametrize("kind", [["a"], {"a": 1}])
def test_a_solution_of_several_values_is_refused(kind):
    with pytest.raises(UserError, match="the column 'answer' holds a"):
        judge("exact_match", "a", answer=kind)


@pytest.mark.parametrize(
    ("extract", "reason"), [("a", "has 0 groups and needs one"), ("(a)(b)", "has 2 groups"), ("(", "is no regular")]
)
def test_an_extraction_has_one_group(extract, reason):
    with pytest.raises(UserError, match=reason):
        BUILDERS["exact_match"](extract=extract)


def test_regex_searches_the_whole_text():
    assert judge("regex", "one\n<b>x</b>", {"pattern": "<b>.*</b>$"}) == 1.0
    assert judge("regex", "one <b>", {"pattern": "^<b>"}) == 0.0
    assert judge("regex", "<B>\n</b>", {"pattern": "(?is)^<b>.*</b>$"}) == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (' {"a": 1} ', 1.0),
        ('{"a": "1"}', 0.0),
        ("{}", 0.0),
        ("[]", 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1} and more', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ('{"a": ' + "9" * 10_000 + "}", 0.0),
    ],
    ids=range(9),
)
def test_json_schema(text, reward):
    assert judge("json_schema", text, {"schema": SCHEMA}) == reward


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "https://example.com/schema.json"},
        {"items": {"$ref": "#/$defs/missing"}},
        {"pattern": "("},
    ],
)
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(UserError, match="schema is no JSON Schema"):
        BUILDERS["json_schema"](schema=schema)


def test_a_schema_may_refer_to_the_standard_ones():
    assert (
        judge("json_schema", '{"type": 1}', {"schema": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}) == 0
    )


@pytest.mark.parametrize(
    ("solution", "text", "reward"),
    [
        ("42", "The answer is 42.", 1.0),
        ("42", "It is 42 and not 41", 0.0),
        (r"$\frac{1}{2}$", r"so \boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"so $\frac{2}{4}$", 1.0),
        (r"2\sqrt{3}", r"\boxed{2}", 0.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        ("x^2 + 2x + 1", "$(x+1)^2$", 1.0),
        (r"\boxed{3}", r"\boxed{3} or 4", 1.0),
        (0.5, "1/2", 1.0),
        ("42", "no idea", 0.0),
        ("42", "", 0.0),
        (None, "42", None),
        ("", "42", None),
    ],
)
def test_math(solution, text, reward):
    assert judge("math", text, solution=solution) == reward


def test_math_takes_a_part_of_both_sides():
    options = {"extract": "#### (.+)"}
    assert judge("math", "2 + 2 = 4\n#### 3.50", options, answer="1 + 1 = 2\n#### 7/2") == 1.0
    assert judge("math", "3.5", options, answer="#### 7/2") == 0.0


@pytest.mark.parametrize("text", [r"\boxed{\frac{1}{3}}", r"\boxed{0.25}", r"the answer is $\frac{2}{6}$", "none"])
def test_math_agrees_with_trl_on_latex(text):
    solution = r"\frac{1}{3}"
    assert [judge("math", text, solution=solution)] == accuracy_reward([[{"content": text}]], [solution])


@pytest.mark.parametrize("buffer", [1, 4, 20])
def test_a_maximum_of_tokens_is_trls_soft_overlong_punishment(buffer):
    peer = get_soft_overlong_punishment(20, buffer)
    for length in range(25):
        own = judge("length", "", {"max_tokens": 20, "buffer": buffer}, num_tokens=length)
        assert own == pytest.approx(peer(completion_ids=[[0] * length])[0])


def test_the_buffer_is_a_fifth_of_the_maximum_and_may_be_none():
    lengths = (8, 9, 10, 11)
    assert [judge("length", "x" * n, {"max_characters": 10}) for n in lengths] == [0, -0.5, -1, -1]
    assert [judge("length", "x" * n, {"max_characters": 10, "buffer": 0}) for n in lengths] == [0, 0, 0, -1]


def test_a_target_is_met_best_by_its_length():
    lengths = (0, 5, 10, 15, 20, 30)
    assert [judge("length", "x" * n, {"target_characters": 10}) for n in lengths] == [0, 0.5, 1, 0.5, 0, 0]
    assert judge("length", "", {"target_tokens": 4}, num_tokens=3) == 0.75
