# SPDX-License-Identifier: Apache-2.0
"""Notes on exceptions name the activity and its folder, also in the traceback."""

import traceback
from pathlib import Path

import pytest

from llm_trainer.common.activity_notes import EVALUATION, note_activity, read_notes


def test_notes_are_read_from_the_innermost_activity_on_and_shown_in_the_traceback():
    folder = Path("/opt/ml/checkpoints")
    with pytest.raises(OSError) as raised, note_activity(EVALUATION), note_activity("writing a checkpoint", folder):
        raise OSError("broken")
    raised.value.add_note("another tool's note")
    assert [(note.activity, note.folder) for note in read_notes(raised.value)] == [
        ("writing a checkpoint", folder),
        (EVALUATION, None),
    ]
    lines = traceback.format_exception(raised.value)
    assert "While writing a checkpoint below /opt/ml/checkpoints\n" in lines
    assert "While evaluating\n" in lines


def test_an_exception_without_notes_has_none():
    assert read_notes(ValueError()) == []
