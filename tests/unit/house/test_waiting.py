# SPDX-License-Identifier: Apache-2.0
"""No test measures its own speed: what it waits for comes, however long a busy machine takes."""

import re
from pathlib import Path

import pytest

from support.measures import ROOT

FOLDERS = ("unit", "integration", "image", "support")
# A difference of clocks, and a limit of its own: of seconds in two digits or more. GUARD_SECONDS ends what hangs.
SPEED = re.compile(r"(monotonic|perf_counter|time\.time)\(\) - \w+ *[<>]|\btimeout=\d\d|\.(wait|join)\(\d\d")


def find_speed(folder: Path) -> list[str]:
    return [
        f"{file.relative_to(folder)}:{number} {line.strip()}"
        for file in sorted(folder.rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if SPEED.search(line)
    ]


def test_what_depends_on_speed_is_found(tmp_path):
    lines = ["assert time.monotonic() - started < 5", "run(command, timeout=60)", "thread.join(20)", "thread.join()"]
    (tmp_path / "test_a.py").write_text("\n".join([*lines, "run(command, timeout=GUARD_SECONDS)"]))
    assert [fault.split()[0] for fault in find_speed(tmp_path)] == ["test_a.py:1", "test_a.py:2", "test_a.py:3"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_test_depends_on_speed(folder):
    own = Path(__file__).name
    assert [fault for fault in find_speed(ROOT / "tests" / folder) if own not in fault] == []
