# SPDX-License-Identifier: Apache-2.0
"""Docstrings and commit subjects keep the house language. tests/support/language.py finds what does not."""

import subprocess
from pathlib import Path

import pytest

from support import language
from support.measures import ROOT

MAX_SUBJECT = 72
SAMPLE = '''
"""What of the rest."""

def count(rows):
    """The rows. {long}"""

def tells(rows):
    """Tells whether `one two three` are there."""

class Row:
    """A row, so that it is one.

    - {half}
    - {half}
    """

    @property
    def size(self):
        """The size in bytes."""
'''


def test_faults_are_found(tmp_path: Path) -> None:
    half = " ".join(["word"] * 13)
    (tmp_path / "sample.py").write_text(SAMPLE.format(long=f"Return {half}, {half}.", half=half))
    assert language.find_faults(tmp_path) == {
        "starts": [
            "sample.py: begins with 'What'",
            "sample.py:4 count: begins with 'The'",
            "sample.py:7 tells: begins with 'Tells'",
        ],
        "sentences": ["sample.py:4 count: 27 words: Return word word word word word word word ..."],
        "phrases": ["sample.py:2: 'What of'", "sample.py:11: 'so that it'"],
    }


@pytest.mark.parametrize("kind", ["starts", "sentences", "phrases"])
def test_the_code_has_no_fault(kind):
    faults = language.find_faults()[kind]
    assert not faults, "\n".join([f"{len(faults)} {kind}:", *faults])


def git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_commit_subjects_are_short():
    if not (ROOT / ".git").exists():
        pytest.skip("no Git history here")
    introduced = git("log", "--diff-filter=A", "--format=%H", "--", str(Path(__file__).relative_to(ROOT)))
    if not introduced:
        pytest.skip("the history here does not reach back to this rule")
    subjects = git("log", "--no-merges", "--format=%s", f"{introduced[-1]}..HEAD")
    assert [subject for subject in subjects if len(subject) > MAX_SUBJECT] == []
