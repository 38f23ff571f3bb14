# SPDX-License-Identifier: Apache-2.0
"""Notes on exceptions that say what the program was doing, which an exception's own text often leaves out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

EVALUATION = "evaluating"


class ActivityNote(str):
    """A note on an exception, such as "While writing a checkpoint below /opt/ml/checkpoints"."""

    activity: str
    folder: Path | None  # where the activity writes; None where it writes nothing

    def __new__(cls, activity: str, folder: Path | None = None) -> Self:
        """Put an activity, such as "writing a checkpoint", and the folder that it writes to into words."""
        note = super().__new__(cls, f"While {activity}" if folder is None else f"While {activity} below {folder}")
        note.activity, note.folder = activity, folder
        return note


@contextmanager
def note_activity(activity: str, folder: Path | None = None) -> Iterator[None]:
    """Add a note to every exception that leaves the block, as `add_note` does: the traceback shows it."""
    try:
        yield
    except Exception as error:
        error.add_note(ActivityNote(activity, folder))
        raise


def read_notes(error: BaseException) -> list[ActivityNote]:
    """Return the notes of one exception, the innermost activity first."""
    return [note for note in getattr(error, "__notes__", []) if isinstance(note, ActivityNote)]
