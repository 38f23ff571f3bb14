# SPDX-License-Identifier: Apache-2.0
import asyncio
import json

import numpy as np
import pytest
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.rewards.own_function import call_function, load_function

STATE = {"global_step": 3}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Returns a function that loads `score` from a file with the given text."""
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.setattr("sys.dont_write_bytecode", False)

    def load_text(text, columns=None, options=None, name="score"):
        (tmp_path / "r.py").write_text(text)
        choice = {"entry": f"r.py:{name}", "file": str(tmp_path / "r.py"), "name": name, "columns": columns}
        return load_function({**choice, "options": options or {}})

    return load_text


def call(function, completions=("a", "b"), **columns):
    request = {"prompts": ["p"] * len(completions), "completions": [*completions], "completion_ids": [], **columns}
    with asyncio.Runner() as runner:
        return call_function(function, {**request, "trainer_state": STATE}, runner, function.__code__.co_filename)


def give(value):
    return lambda **columns: value


def test_a_function_gets_what_trl_gives(load):
    function = load(
        "def score(prompts, completions, completion_ids, level, trainer_state, log_extra, log_metric, **rest):\n"
        "    log_extra('seen', completions)\n"
        "    log_metric('step', trainer_state.global_step)\n"
        "    return [len(c) + l for c, l in zip(completions, level)]\n",
        columns=["level"],
    )
    assert call(function, ["a", "bb"], level=[1, 2]) == {
        "rewards": [2.0, 4.0],
        "extra": [("seen", ["a", "bb"])],
        "metrics": [("step", 3.0)],
    }


def test_an_async_function_is_awaited_in_one_loop(load):
    function = load(
        "import asyncio\nloops = set()\n"
        "async def score(completions, **columns):\n"
        "    loops.add(asyncio.get_running_loop())\n    await asyncio.sleep(0)\n"
        "    return [len(loops) for _ in completions]\n"
    )
    with asyncio.Runner() as runner:
        request = {"prompts": [], "completions": ["a"], "completion_ids": [], "trainer_state": STATE}
        answers = [call_function(function, dict(request), runner, "r.py")["rewards"] for _ in range(2)]
    assert answers == [[1.0], [1.0]]


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5],
        (1, 2.5),
        np.array([1, 2.5]),
        torch.tensor([1, 2.5]),
        [torch.tensor(1), np.float32(2.5)],
        iter([1, 2.5]),
    ],
    ids=range(6),
)
def test_all_kinds_of_numbers_are_rewards(result):
    assert call(give(result))["rewards"] == [1.0, 2.5]


def test_true_false_and_none_are_rewards():
    assert call(give([True, None]))["rewards"] == [1.0, None]


@pytest.mark.parametrize(
    ("result", "error", "row"),
    [
        (None, "returned a NoneType and no list", None),
        (1.0, "returned a float and no list", None),
        ("ab", "returned a str and no list", None),
        ({"a": 1, "b": 2}, "returned a dict and no list", None),
        ([1.0], "returned 1 rewards where each completion needs one,", None),
        ([1.0] * 3, "returned more than 2 rewards where each completion needs one,", None),
        (iter(int, 1), "returned more than 2 rewards where each completion needs one,", None),
        ([1.0, "1.0"], "returned a str as a reward", 1),
        ([[1.0], 1.0], "returned a list as a reward", 0),
        ([1.0, float("nan")], "returned nan as a reward", 1),
        ([float("inf"), 1.0], "returned inf as a reward", 0),
        ([1.0, 1j], "returned a complex as a reward", 1),
    ],
    ids=range(12),
)
def test_what_is_no_reward_is_told(result, error, row):
    assert call(give(result)) == {"error": error, "row": row}


def test_a_tensor_of_several_numbers_is_no_reward():
    answer = call(give([torch.zeros(2), 1.0]))
    assert answer["error"].startswith("returned a Tensor as a reward (")
    assert answer["row"] == 0


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("raise ValueError('no digit')", "raised ValueError: no digit (line 3 of r.py)"),
        ("raise KeyError", "raised KeyError (line 3 of r.py)"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3 (line 3 of r.py)"),
        ("yield 1 / 0", "raised ZeroDivisionError: division by zero (line 3 of r.py)"),
    ],
)
def test_an_error_is_told_with_its_line(load, line, error):
    answer = call(load(f"def score(**columns):\n    x = 1\n    {line}\n"))
    assert answer["error"] == error
    assert "in score" in answer["traceback"]


def test_an_answer_holds_what_json_holds_or_texts():
    answer = call(lambda log_extra, **columns: log_extra("x", [object(), 1]) or [1, 2])
    assert json.loads(json.dumps(answer, default=str))["extra"][0][1][1] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def scor(**c): pass", "r.py has no function 'score': the nearest is 'scor'."),
        ("score = 3", "r.py has no function 'score': write `def score(completions, **columns)` there."),
        ("from os.path import join", "r.py has no function 'score': write `def score("),
        ("def score(:", "r.py raises SyntaxError: invalid syntax (line 1 of r.py) when it is imported: correct it."),
        ("x = 1\nx.y", "r.py raises AttributeError: 'int' object has no attribute 'y' (line 2 of r.py) when"),
        (
            "import nothing_such",
            "r.py raises ModuleNotFoundError: No module named 'nothing_such' (line 1 of r.py) when",
        ),
        ("exit(1)", "r.py raises SystemExit: 1 (line 1 of r.py) when it is imported: correct it."),
        ("def score(completions): pass", "takes no further columns, and gets all: end its parameters with"),
        ("def score(a, /, **c): pass", "takes 'a' by position alone, and gets it by name: remove the `/`."),
        ("def score(level, **c): pass", "takes 'level', and the rows have grade: rename the parameter or the column"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(load, text, sentence):
    with pytest.raises(UserError) as error:
        load(text, columns=["grade"])
    assert sentence in str(error.value)
    assert str(error.value).startswith("reward_functions='r.py:score'")


def test_a_parameter_may_come_from_the_options_or_from_columns_that_are_not_known(load):
    text = "def score(level, **columns): pass"
    assert callable(load(text, columns=["grade"], options={"level": 1}))
    assert callable(load(text, columns=None))


def test_what_lies_beside_the_file_can_be_imported_and_hides_no_library(load, tmp_path):
    (tmp_path / "own_helper.py").write_text("VALUE = 2")
    (tmp_path / "json.py").write_text("raise SystemExit('imported in the place of the library')")
    function = load("import json, own_helper\ndef score(**columns): return [own_helper.VALUE]")
    assert call(function, ["a"])["rewards"] == [2.0]
    assert not list(tmp_path.glob("__pycache__"))


def test_an_object_that_can_be_called_is_a_function(load):
    text = "class Score:\n    def __call__(self, completions, **columns): return [0]\nscore = Score()"
    assert callable(load(text))
