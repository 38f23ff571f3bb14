# SPDX-License-Identifier: Apache-2.0
"""Pytest's options `--shard K/N` and `--stop-after-seconds S`, for tests that take longer than one run may.

A shard is a set of whole test files, since the tests of a file share jobs. The shards of a number N hold every file
once, and take about the same time by the seconds in long_seconds.json. `python tests/support/schedule.py JUNIT_XML`
writes these anew from the report of `make test-long JUNIT=--junit-xml=JUNIT_XML`.
"""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any
from xml.etree import ElementTree

import pytest

SECONDS_FILE = Path(__file__).with_name("long_seconds.json")
TIME_IS_OVER = "the time is over"
STOP_TIME = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add both options."""
    group = parser.getgroup("schedule")
    group.addoption("--shard", type=parse_shard, metavar="K/N", help="run the K-th of N parts of the test files")
    group.addoption(
        "--stop-after-seconds", type=float, metavar="S", help="begin no test after S seconds, and name those left"
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Return the two numbers of K/N. Raises ValueError unless K is one of 1 to N."""
    shard, _, number = text.partition("/")
    if not 1 <= int(shard) <= int(number):
        raise ValueError(text)
    return int(shard), int(number)


def pytest_configure(config: pytest.Config) -> None:
    """Set the time at which the run stops, which is one for all of its processes."""
    seconds = config.getoption("--stop-after-seconds")
    given = getattr(config, "workerinput", {})
    config.stash[STOP_TIME] = given.get("stop_time", math.inf if seconds is None else time.time() + seconds)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand the time to a process that xdist starts."""
    node.workerinput["stop_time"] = node.config.stash[STOP_TIME]


@pytest.hookimpl(trylast=True)  # after -m, which leaves the files whose tests are shared out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of the chosen shard."""
    if config.getoption("--shard"):
        shard, number = config.getoption("--shard")
        recorded = json.loads(SECONDS_FILE.read_text(encoding="utf-8"))
        files = share_out({item.path.name for item in items}, recorded, number)[shard - 1]
        config.hook.pytest_deselected(items=[item for item in items if item.path.name not in files])
        items[:] = [item for item in items if item.path.name in files]


def share_out(files: Iterable[str], recorded: dict[str, float], number: int) -> list[set[str]]:
    """Return the files of each shard: longest first, each to the shard that takes the least so far.

    A file without recorded seconds is taken to last as long as the mean of the others.
    """
    unknown = mean(recorded.values()) if recorded else 1.0
    shards: list[set[str]] = [set() for _ in range(number)]
    seconds = [0.0] * number
    for file in sorted(files, key=lambda name: (-recorded.get(name, unknown), name)):
        shortest = seconds.index(min(seconds))
        shards[shortest].add(file)
        seconds[shortest] += recorded.get(file, unknown)
    return shards


@pytest.hookimpl(tryfirst=True)  # before fixtures begin jobs
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the time does not suffice for."""
    if time.time() > item.config.stash[STOP_TIME]:
        pytest.skip(TIME_IS_OVER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that were not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    left = [report.nodeid for report in skipped if TIME_IS_OVER in str(report.longrepr)]
    if left:
        terminalreporter.section("not run, since the time was over")
        terminalreporter.write_line("\n".join(sorted(left)))


def read_seconds(report: Path) -> dict[str, float]:
    """Return the seconds that the tests of each file took, by a report in JUnit's format."""
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        module = next(part for part in case.attrib["classname"].split(".") if part.startswith("test_"))
        seconds[f"{module}.py"] += float(case.attrib["time"])
    return {file: round(total) for file, total in sorted(seconds.items())}


if __name__ == "__main__":
    SECONDS_FILE.write_text(f"{json.dumps(read_seconds(Path(sys.argv[1])), indent=2)}\n", encoding="utf-8")
