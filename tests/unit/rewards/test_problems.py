# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.rewards.problems import find_problems


@pytest.fixture
def channels(tmp_path):
    (tmp_path / "r.py").write_text("def score(completions, level, **columns): ...\ndef math(**columns): ...\n")
    return {"rewards": tmp_path}


def find(channels, functions, options=None, weights=None, columns=("answer", "level")):
    return list(find_problems(functions, options or {}, weights, channels, columns))


def test_right_rewards_have_no_problem(channels):
    options = {"length": {"max_tokens": 10}, "regex": {"pattern": "x"}, "json_schema": {"schema": {}}}
    functions = ["exact_match", "math", "r.py:score", *options]
    assert find(channels, functions, options, [1.0, 0.5, 0.0, -1.0, 2, 1]) == []
    assert find(channels, ["math", "r.py:score"], columns=None) == []


@pytest.mark.parametrize(
    ("functions", "options", "weights", "start"),
    [
        ([], {}, None, "reward_functions is empty, and each completion needs a reward"),
        (["math"], {}, [1, 2], "reward_weights has 2 weights for 1 reward_functions: give one for each"),
        (["math"], {}, [float("nan")], "reward_weights has nan: give a finite number."),
        (["math"], {"mat": {}}, None, "reward_options names 'mat', which is not in reward_functions: the nearest is"),
        (["math", "math"], {}, None, "reward_functions has 'math' and 'math', which are both logged as 'math'"),
        (["math", "r.py:math"], {}, None, "reward_functions has 'math' and 'r.py:math', which are both logged as"),
        (["maths"], {}, None, "reward_functions='maths' has to be a built-in reward, or FILE.py:NAME"),
        (["s.py:score"], {}, None, "reward_functions='s.py:score' names a file that is not there: put it into"),
        (["r.py:scor"], {}, None, "reward_functions='r.py:scor': r.py has no function 'scor': the nearest is 'score'."),
        (["regex"], {}, None, "reward_options: regex lacks its option 'pattern'"),
        (["regex"], {"regex": {"pattern": "("}}, None, "reward_options: regex: pattern='(' is no regular expression"),
        (["math"], {"math": {"column": "x"}}, None, "reward_functions='math' needs the column 'x'"),
        (["json_schema"], {"json_schema": {"schema": "s.json"}}, None, "reward_options: json_schema: schema='s.json'"),
        (["json_schema"], {"json_schema": {"schema": {"type": 1}}}, None, "reward_options: json_schema: schema is no"),
    ],
)
def test_each_mistake_is_one_sentence(channels, functions, options, weights, start):
    (problem,) = find(channels, functions, options, weights)
    assert problem.startswith(start)
    assert problem.endswith(".")


def test_all_mistakes_are_told_at_once(channels):
    problems = find(channels, ["maths", "regex", "r.py:score"], {"length": {}}, [1], columns=["answer", "prompts"])
    starts = ["reward_weights has 1", "reward_options names 'length'", "the rows have a column 'prompts', which"]
    starts += ["reward_functions='maths'", "reward_options: regex lacks", "reward_functions='r.py:score' takes 'level'"]
    assert len(problems) == len(starts)
    assert all(problem.startswith(start) for problem, start in zip(problems, starts, strict=True))
