# SPDX-License-Identifier: Apache-2.0
"""Shards hold every test file once, and a run that stops names what it did not begin."""

import os
import subprocess
import sys

import pytest

from support import schedule
from support.measures import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="tests.integration.test_jobs" name="test_a" time="1.4"/>
<testcase classname="tests.integration.test_jobs.TestAll" name="test_b" time="2.2"/>
<testcase classname="tests.integration.test_hosts" name="test_c" time="0.9"/>
</testsuite></testsuites>"""


def test_shards_hold_every_file_once_and_take_about_the_same_time():
    recorded = {"a.py": 50, "b.py": 40, "c.py": 30, "d.py": 20, "gone.py": 10}
    shards = schedule.share_out(["d.py", "c.py", "new.py", "b.py", "a.py"], recorded, 2)
    assert shards == [{"a.py", "new.py"}, {"b.py", "c.py", "d.py"}]  # a new file counts as the mean, 30
    assert schedule.share_out(["x.py", "y.py"], {}, 3) == [{"x.py"}, {"y.py"}, set()]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b"])
def test_a_shard_is_one_of_the_number(text):
    with pytest.raises(ValueError):
        schedule.parse_shard(text)


def test_seconds_are_summed_by_file(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(REPORT)
    assert schedule.read_seconds(report) == {"test_hosts.py": 1, "test_jobs.py": 4}


@pytest.fixture
def run_pytest(tmp_path):
    """Runs pytest on three files of two tests each, and returns its output."""
    (tmp_path / "conftest.py").write_text("from support.schedule import *\n")
    for name in ("one", "two", "three"):
        (tmp_path / f"test_{name}.py").write_text("def test_a(): pass\ndef test_b(): pass\n")

    def run(*options: str) -> str:
        settings = ["-c", "/dev/null", "--rootdir", str(tmp_path), "-o", f"pythonpath={ROOT / 'tests'}", "-v"]
        command = [sys.executable, "-m", "pytest", *settings, *options, str(tmp_path)]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take a second to import
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    return run


def test_three_shards_run_all(run_pytest):
    outputs = [run_pytest("--shard", f"{number}/3") for number in (1, 2, 3)]
    assert all("2 passed, 4 deselected" in output for output in outputs)
    for name in ("one", "two", "three"):
        assert sum(f"test_{name}.py::test_a PASSED" in output for output in outputs) == 1


def test_a_run_without_time_names_what_it_leaves(run_pytest):
    output = run_pytest("-p", "xdist", "--numprocesses", "2", "--stop-after-seconds", "0")
    left = output.partition("not run, since the time was over")[2].split()
    assert left[1:7] == [f"test_{name}.py::test_{each}" for name in ("one", "three", "two") for each in "ab"]
    assert "6 skipped" in output
    assert "6 passed" in run_pytest("--stop-after-seconds", "600")
