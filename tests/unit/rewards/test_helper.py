# SPDX-License-Identifier: Apache-2.0
"""The program of a helper process, by its lines alone. test_rewards.py and test_process.py have what surrounds it."""

import json
import signal
import subprocess

import pytest

from llm_trainer.common.processes import PYTHON
from support.waiting import GUARD_SECONDS

REQUEST = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]], "trainer_state": {}}


def run_helper(choice, *requests):
    asked = [{"number": number, "request": request} for number, request in enumerate((choice, *requests))]
    lines = "".join(f"{json.dumps(line)}\n" for line in asked)
    command = [*PYTHON, "-m", "llm_trainer.rewards.helper"]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)


def choose(name, file=None, **options):
    choice = {"entry": name, "name": name, "options": options, "columns": None, "row_cpu_seconds": 5.0}
    return {**choice, "file": str(file) if file else None}


def test_it_answers_each_line_and_ends_with_its_input():
    result = run_helper(choose("regex", pattern="c"), REQUEST, {**REQUEST, "completions": ["d"]})
    assert (result.returncode, result.stderr) == (0, "")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"number": 0},
        {"rewards": [1.0], "number": 1},
        {"rewards": [0.0], "number": 2},
    ]


def test_a_reward_that_cannot_be_loaded_is_a_problem_and_ends_it():
    result = run_helper(choose("regex", pattern="("), REQUEST)
    (answer,) = map(json.loads, result.stdout.splitlines())
    assert answer["problem"].startswith("reward_options: regex: pattern='(' is no regular expression")


@pytest.mark.parametrize(("name", "options"), [("math", {}), ("json_schema", {"schema": {}})])
def test_a_package_that_is_missing_is_told(monkeypatch, tmp_path, name, options):
    for package in ("math_verify", "jsonschema"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('No module named {package}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    result = run_helper(choose(name, **options))
    (answer,) = map(json.loads, result.stdout.splitlines())
    assert "needs a package that is missing (No module named" in answer["problem"]


def test_what_a_function_prints_and_reads_meets_no_protocol(tmp_path):
    (tmp_path / "r.py").write_text(
        "import os, sys\n"
        "def score(completions, **columns):\n"
        "    print('printed')\n    os.system('echo run by a shell')\n    os.write(1, b'written\\n')\n"
        "    return [len(sys.stdin.read()) for _ in completions]\n"
    )
    result = run_helper(choose("score", tmp_path / "r.py"), REQUEST)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"number": 0},
        {"rewards": [0.0], "extra": [], "metrics": [], "number": 1},
    ]
    assert sorted(result.stderr.splitlines()) == ["printed", "run by a shell", "written"]


def test_a_pattern_that_backtracks_without_an_end_is_ended_by_the_kernel():
    choice = {**choose("regex", pattern="(a+)+$"), "row_cpu_seconds": 0.2}
    result = run_helper(choice, {**REQUEST, "completions": ["a" * 100 + "b"]})
    assert result.returncode == -signal.SIGPROF


def test_a_built_in_reward_has_its_bound_of_memory():
    """An expression may stand for a number that fills any memory."""
    program = f"from llm_trainer.rewards.helper import build_judge; build_judge({choose('length', max_tokens=1)!r})"
    for num_bytes, reason in (("2**30", ""), ("5 * 2**30", "MemoryError")):
        command = [*PYTHON, "-c", f"{program}; bytearray({num_bytes})"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)
        assert result.stderr.splitlines()[-1:] == [reason] * bool(reason)


def test_a_row_that_cannot_be_compared_is_an_error():
    result = run_helper(choose("exact_match"), {**REQUEST, "answer": [["a", "b"]]})
    assert json.loads(result.stdout.splitlines()[1]) == {
        "error": "the column 'answer' holds a list, where a text or a number is needed",
        "row": 0,
        "number": 1,
    }
