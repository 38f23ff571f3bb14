# SPDX-License-Identifier: Apache-2.0
"""Everything that leaves a process goes through common/log.py and common/files.py, which hide secrets."""

import re
from pathlib import Path

import pytest

import llm_trainer

CODE = Path(llm_trainer.__file__).parent

# What writes a text past them. A command's own output is cleaned by the stream (`log.guard_output`).
WRITERS = re.compile(
    r"\.write_text\(|json\.dump\(|yaml\.(?:safe_)?dump\(|(?<![\w.])print\(|sys\.std(?:out|err)\.write|open\([^)]*[\"'][wax]\+?[\"']"
)
ALLOWED = {
    "model/memory/peak.py",  # the kernel's own file, /proc/self/clear_refs
}
FILES = sorted(file for file in CODE.rglob("*.py") if file.relative_to(CODE).parts[0] not in ("common", "cli"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CODE)))
def test_no_text_is_written_past_the_sinks(file):
    lines = [line.strip() for line in file.read_text().splitlines()]
    found = [line for line in lines if WRITERS.search(line) and not line.startswith("'")]  # not a model card's snippet
    assert found == [] or str(file.relative_to(CODE)) in ALLOWED
