# SPDX-License-Identifier: Apache-2.0
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from llm_trainer.rewards import process
from llm_trainer.rewards.process import EndedHelper, HelperFault, HelperProcess, SilentHelper, build_variables
from support.waiting import GUARD_SECONDS, wait_until

ROWS = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]], "trainer_state": {}}


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts a helper with a function `score` of the given lines."""
    started = []

    def start_helper(*lines, before=""):
        body = "\n    ".join(lines)
        text = f"import os, sys, time, subprocess\n{before}\ndef score(completions, **columns):\n    {body}\n"
        (tmp_path / "r.py").write_text(text)
        helper = HelperProcess("r.py:score")
        started.append(helper)
        choice = {
            "entry": "r.py:score",
            "file": str(tmp_path / "r.py"),
            "name": "score",
            "options": {},
            "columns": None,
        }
        assert helper.ask(choice, GUARD_SECONDS) == {"number": 1}
        return helper

    yield start_helper
    for helper in started:
        helper.close()


def ask(helper, seconds=GUARD_SECONDS, **rows):
    return helper.ask({**ROWS, **rows}, seconds)


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_request_and_an_answer_may_be_larger_than_a_pipe(start):
    helper = start("columns['log_extra']('x', completions)", "print('y' * 1000000)", "return [len(completions[0])]")
    text = "x" * 3_000_000
    for number in (2, 3):
        answer = {"rewards": [3e6], "extra": [["x", [text]]], "metrics": [], "number": number}
        assert ask(helper, completions=[text]) == answer


def test_what_a_function_prints_reaches_the_log_clean_and_not_beyond_its_bound(start, capsys, monkeypatch):
    monkeypatch.setattr(process, "MAX_PRINTED_BYTES", 100)
    helper = start("print('a; train_loss=0.5; \\x1b[31m')", "print('line\\n' * 1000)", "return [1]")
    ask(helper)
    helper.drain_output()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "r.py:score: a; train_loss =0.5; \\x1b[31m"
    assert sum(line.endswith("line") for line in lines) in range(10, 20)  # of 5 characters each
    assert lines[-1].endswith("(What it prints beyond is left out of the log.)")
    ask(helper)
    helper.drain_output()
    assert "line" in capsys.readouterr().out  # each call has its bound


def test_a_function_that_hangs_gives_no_answer_and_prints_where_it_is(start, capsys, monkeypatch):
    monkeypatch.setattr(process, "END_SECONDS", GUARD_SECONDS)
    helper = start("while True:", "    pass")
    with pytest.raises(SilentHelper, match=r"gave no answer within 0\.5 seconds"):
        ask(helper, 0.5)
    helper.trace()
    helper.close()
    assert re.search(r'r\.py", line [45] in score', capsys.readouterr().out)


@pytest.mark.parametrize("line", ["time.sleep(1000)", pytest.param("9**9**9", marks=pytest.mark.long)])
def test_a_function_that_catches_all_signals_is_killed(start, line):
    catching = "import signal\nfor number in set(signal.Signals) - {9, 19}:\n    signal.signal(number, signal.SIG_IGN)"
    helper = start(line, before=catching)
    with pytest.raises(SilentHelper):
        ask(helper, 0.5)
    helper.trace()
    helper.close()
    assert helper.child.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("line", "exit_code", "text"),
    [
        ("os._exit(3)", 3, "ended its process with exit code 3"),
        ("os._exit(0)", 0, "ended its process with exit code 0"),
        ("os.kill(os.getpid(), 11)", -11, "was ended by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", -9, "was killed by SIGKILL, most likely because the host ran out of memory"),
    ],
)
def test_the_end_of_a_process_is_told(start, line, exit_code, text):
    helper = start(line)
    with pytest.raises(EndedHelper) as fault:
        ask(helper)
    assert (fault.value.exit_code, str(fault.value)) == (exit_code, text)


def test_an_answer_has_its_bound(start, monkeypatch):
    monkeypatch.setattr(process, "MAX_ANSWER_BYTES", 2**20)
    helper = start("columns['log_extra']('x', ['y' * 2**21])", "return [1]")
    with pytest.raises(HelperFault, match="answered with more than 1 MiB"):
        ask(helper)


@pytest.mark.parametrize("words", ['{"rewards": [1]}', "no JSON", "[1]", "[" * 100_000], ids=range(4))
def test_a_function_cannot_answer_in_the_place_of_its_process(start, words):
    """It may find the pipe, and what it writes there is no answer."""
    finding = (
        "for fd in range(3, 64):",
        f"    try: os.write(fd, {words!r}.encode() + b'\\n')",
        "    except OSError: pass",
    )
    helper = start(*finding, "return [1]")
    with pytest.raises(HelperFault, match="wrote into the pipe of its answers"):
        ask(helper)


def test_what_a_function_starts_ends_with_its_process(start):
    helper = start("child = subprocess.Popen(['sleep', '1000'])", "return [child.pid]")
    pid = int(ask(helper)["rewards"][0])
    assert not is_gone(pid)
    helper.close()
    wait_until(lambda: is_gone(pid))


def test_a_helper_ends_with_its_worker(tmp_path):
    program = (
        "import os, time\nfrom llm_trainer.rewards.process import HelperProcess\n"
        "helper = HelperProcess('x')\nprint(helper.child.pid, flush=True)\ntime.sleep(1000)"
    )
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    worker.stdout.close()
    wait_until(lambda: is_gone(pid))


def test_a_helper_has_no_secret_of_the_job(start, monkeypatch):
    for name in ("HF_TOKEN", "LLM_TRAINER_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hf_hidden0word")
    monkeypatch.setenv("WANDB_API_KEY", "hf_hidden0word")
    monkeypatch.setenv("JUDGE", "an address of the user's own")
    assert "hf_hidden0word" not in build_variables().values()
    helper = start("return [sum('hf_hidden0word' in v for v in os.environ.values()) + ('JUDGE' in os.environ) / 2]")
    assert ask(helper)["rewards"] == [0.5]


def test_a_process_is_closed_once(start):
    helper = start("return [1]")
    helper.close()
    helper.close()
    assert helper.child.returncode == -signal.SIGKILL
    assert not os.path.exists(f"/proc/{helper.child.pid}")
