# SPDX-License-Identifier: Apache-2.0
import datetime
import signal
from types import SimpleNamespace

import pytest
from trl.trainer.utils import get_callable_name, is_async_callable

from llm_trainer.common.errors import UserError
from llm_trainer.rewards import rewards
from llm_trainer.rewards.process import HelperProcess
from llm_trainer.rewards.rewards import load_rewards, show_prompt
from support.waiting import GUARD_SECONDS

PROMPTS, COMPLETIONS, IDS = ["What is 1?", "What is 2?"], ["good", "bad"], [[1, 2], [3]]
ENDLESS = "a" * 100 + "b"  # for the pattern (a+)+$


@pytest.fixture
def load(tmp_path):
    """Returns a function that loads one reward; `lines` are those of a function `score` in the user's file."""
    loaded = []

    def load_one(entry="r.py:score", *lines, seconds=GUARD_SECONDS, **options):
        body = "\n    ".join(lines) or "pass"
        (tmp_path / "r.py").write_text(f"import os, time\ndef score(completions, **columns):\n    {body}\n")
        loaded.extend(load_rewards([entry], {entry: options}, {"rewards": tmp_path}, seconds))
        return loaded[-1]

    yield load_one
    for reward in loaded:
        reward.process.close()


def call(reward, **columns):
    return reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, **columns)


def fail(reward, **columns):
    with pytest.raises(UserError) as error:
        call(reward, **columns)
    assert reward.process.child.returncode is not None  # it has ended
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("exact_match", {}, [1.0, 0.0]),
        ("regex", {"pattern": "^b"}, [0.0, 1.0]),
        ("json_schema", {"schema": {}}, [0.0, 0.0]),
        ("length", {"max_tokens": 1}, [-1.0, 0.0]),
    ],
)
@pytest.mark.parametrize("is_conversation", [False, True])
def test_a_built_in_reward_takes_texts_and_conversations(load, name, options, expected, is_conversation):
    reward = load(name, **options)
    given = [[{"role": "assistant", "content": text}] if is_conversation else text for text in COMPLETIONS]
    asked = [[{"role": "user", "content": text}] if is_conversation else text for text in PROMPTS]
    assert reward(prompts=asked, completions=given, completion_ids=IDS, solution=["good", "x"]) == expected


def test_trl_finds_the_name_and_calls_it_as_a_function(load):
    for entry, name in (("length", "length"), ("r.py:score", "score")):
        reward = load(entry, **({"max_tokens": 1} if entry == "length" else {}))
        assert get_callable_name(reward) == name
        assert not is_async_callable(reward)


def test_a_users_function_is_called_once_with_all_and_what_it_notes_reaches_trl(load):
    reward = load(
        "r.py:score",
        "columns['log_extra']('level', columns['level'])",
        "columns['log_metric']('half', 0.5)",
        "return [columns['trainer_state'].global_step, None]",
    )
    noted = []
    state = SimpleNamespace(global_step=7, epoch=0.5, log_history=[object()])
    tools = {"log_extra": lambda *note: noted.append(note), "log_metric": lambda *note: noted.append(note)}
    assert call(reward, level=["a", "b"], trainer_state=state, **tools) == [7.0, None]
    assert noted == [("level", ["a", "b"]), ("half", 0.5)]
    assert call(reward, level=["a", "b"]) == [None, None]  # without a trainer


def test_options_of_a_users_function_are_its_arguments(load):
    assert call(load("r.py:score", "return [columns['bonus']] * 2", bonus=3)) == [3.0, 3.0]


def test_a_raise_is_told_with_its_line_and_its_completion(load, capsys):
    sentence = fail(load("r.py:score", "return [1 / (each != 'bad') for each in completions]"))
    assert sentence == (
        "reward_functions='r.py:score' raised ZeroDivisionError: division by zero (line 3 of r.py) for the completion "
        "of the prompt 'What is 2?': correct the function, and return a list with a number for each completion, or "
        "None for one without a reward."
    )
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_raise_for_no_single_completion_is_told_with_the_first(load):
    sentence = fail(load("r.py:score", "assert len(completions) < 2, 'too many'", "return [1]"))
    assert "raised AssertionError: too many (line 3 of r.py) for 2 completions, the first of the prompt" in sentence


def test_a_hang_while_the_completion_is_sought_ends_the_search(load):
    reward = load("r.py:score", "time.sleep(1000)")
    reward.timeout_seconds = 0.5
    rows = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS}
    assert reward.find_row(rows, {}) is None


def test_a_hang_is_told_and_ended(load):
    assert fail(load("r.py:score", "time.sleep(1000)", seconds=0.5)) == (
        "reward_functions='r.py:score' gave no answer within reward_timeout_seconds=0.5 for 2 completions, the first "
        "of the prompt 'What is 1?': have it wait and compute for less, or raise reward_timeout_seconds (the log tells "
        "where it was)."
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("os._exit(3)", "ended its process with exit code 3 for 2 completions, the first of the prompt 'What is 1?'"),
        ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV for 2 completions"),
        ("return [1.0, float('nan')]", "returned nan as a reward for the completion of the prompt 'What is 2?'"),
        ("return [1.0, 'x']", "returned a str as a reward for the completion of the prompt 'What is 2?'"),
        ("return [1.0]", "returned 1 rewards where each completion needs one, for 2 completions, the first of the"),
        ("return 1.0", "returned a float and no list for 2 completions"),
    ],
)
def test_what_is_no_reward_ends_the_job(load, line, text):
    assert text in fail(load("r.py:score", line))


def test_a_column_that_json_lacks_is_told(load):
    with pytest.raises(UserError) as error:
        call(load("r.py:score"), day=[datetime.date(2026, 1, 1)] * 2)
    assert str(error.value).startswith("reward_functions='r.py:score' cannot be given the column 'day' (Object of type")


def test_a_built_in_reward_is_given_no_more_columns_than_it_compares(load):
    assert call(load("exact_match"), day=[datetime.date(2026, 1, 1)] * 2, answer=["good", "good"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [("regex", {"pattern": "(a+)+$"}, ENDLESS), ("math", {}, r"\boxed{9^{9^{9^{9}}}}")],
)
def test_a_completion_that_cannot_be_judged_gets_0_and_the_others_their_own(
    load, monkeypatch, capsys, name, options, text
):
    monkeypatch.setattr(rewards, "ROW_CPU_SECONDS", 0.5)
    reward = load(name, **options)
    first = reward.process
    completions = ["aa 3", text, "aa"] if name == "regex" else ["3", text, r"\boxed{3}"]
    given = reward(prompts=["p"] * 3, completions=completions, completion_ids=[[1]] * 3, answer=["3"] * 3)
    assert given == ([0.0, 0.0, 1.0] if name == "regex" else [1.0, 0.0, 1.0])
    assert first.child.returncode == -signal.SIGPROF
    assert (
        f"Warning: {name}: a completion of the prompt 'p' could not be judged within its bounds"
        in capsys.readouterr().out
    )


def test_warnings_are_few(load, capsys):
    reward = load("math")
    many = 2 * rewards.MAX_WARNINGS
    assert (
        reward(prompts=["p"] * many, completions=["1"] * many, completion_ids=[[]] * many, answer=[None] * many)
        == [None] * many
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == rewards.MAX_WARNINGS
    assert lines[-1].endswith(
        "has nothing to be compared with in its row, and gets no reward; further ones are not told."
    )


def test_a_built_in_reward_that_is_ended_from_outside_ends_the_job(load):
    reward = load("exact_match")
    reward.process.child.kill()
    reward.process.child.wait()
    assert "was killed by SIGKILL" in fail(reward, answer=["a", "b"])


def test_rows_that_a_built_in_reward_cannot_compare_end_the_job(load):
    assert fail(load("exact_match"), answer=[["a"], ["b"]]) == (
        "reward_functions='exact_match' cannot judge: the column 'answer' holds a list, where a text or a number is "
        "needed for the completion of the prompt 'What is 1?': correct the rows."
    )


def test_a_file_that_hangs_when_it_is_imported_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "LOAD_SECONDS", 1)
    (tmp_path / "r.py").write_text("import time\ntime.sleep(1000)")
    with pytest.raises(UserError, match="gave no answer within 1 seconds while it was imported: correct what its file"):
        load_rewards(["r.py:score"], {}, {"rewards": tmp_path}, GUARD_SECONDS)


def test_a_file_that_ends_its_process_when_it_is_imported_is_told(tmp_path):
    (tmp_path / "r.py").write_text("import os\nos._exit(1)")
    with pytest.raises(UserError, match="ended its process with exit code 1 while it was imported"):
        load_rewards(["r.py:score"], {}, {"rewards": tmp_path}, GUARD_SECONDS)


def test_a_reward_ends_with_its_block(load):
    with load("length", max_tokens=1) as reward:
        assert isinstance(reward.process, HelperProcess)
    assert reward.process.child.returncode == -signal.SIGKILL


def test_prompts_are_shown_short():
    assert show_prompt("a\n b") == "'a b'"
    assert show_prompt([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]) == "'y'"
    assert show_prompt("x" * 500) == f"'{'x' * 80}...'"
