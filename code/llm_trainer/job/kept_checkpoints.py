# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that a job may go on from, looked at before it starts: readable all, and whole the named one."""

import os
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.files import explain_denied, find_denied
from llm_trainer.config.sections import TrainingSettings
from llm_trainer.job.checkpoint_dir import find_fault, find_size_fault, list_checkpoints, read_marker

TRAINER_STATE = "trainer_state.json"  # the Trainer's own record
DEPTH = 3  # of a sharded optimizer's files below a checkpoint


def find_checkpoint_problems(settings: TrainingSettings, folder: Path, is_alone: bool) -> Iterator[str]:
    """Yield sentences on checkpoints that cannot be read, and on a named one that lacks files or parts of them.

    `folder` is the job's own. A host that is not alone may lack files that another one has. No file is read whole.
    """
    if not goes_on(settings):
        return
    named = find_named(settings, folder)
    kept = list_checkpoints(folder)
    denied = [path for place in kept for path in find_denied(place, DEPTH)]
    yield from explain_denied(denied, folder)
    if named is None or denied:
        return
    denied = list(find_denied(named, DEPTH))
    yield from explain_denied(denied, named)
    if is_alone and not denied and (fault := find_lack(named)):
        yield explain_fault(named, fault)


def find_damaged_checkpoint(settings: TrainingSettings, folder: Path, is_alone: bool) -> Iterator[str]:
    """Yield a sentence where a named checkpoint's files differ from their digests. All of them are read."""
    named = find_named(settings, folder) if is_alone and goes_on(settings) else None
    if named is not None and read_marker(named) is not None and (fault := find_fault(named)):
        yield explain_fault(named, fault)


def goes_on(settings: TrainingSettings) -> bool:
    """Tell whether a job goes on from a checkpoint where there is one."""
    wish = settings.resume_from_checkpoint
    return (settings.use_checkpoints or wish is not None) and (wish or "").lower() != "false"


def find_named(settings: TrainingSettings, folder: Path) -> Path | None:
    """Return the checkpoint that the user names, None where there is none or the job goes on from its own.

    A restarted job has checkpoints of its own, which are further than one that is named elsewhere.
    """
    wish = settings.resume_from_checkpoint or "true"
    if wish.lower() in ("true", "false"):
        return None
    is_own = Path(wish).parent == folder
    return Path(wish) if is_own or all(read_marker(kept) is None for kept in list_checkpoints(folder)) else None


def find_lack(checkpoint: Path) -> str | None:
    """Return what a checkpoint lacks, such as "optimizer.pt is missing", by the sizes of its files; else None."""
    if not checkpoint.is_dir():
        return "it is not there"
    marker = read_marker(checkpoint)
    files = marker.files if marker is not None else {}
    faults = (find_size_fault(checkpoint, name, size) for name, (size, _) in sorted(files.items()))
    return next(filter(None, faults), None) or find_state_fault(checkpoint)


def find_state_fault(checkpoint: Path) -> str | None:
    """Return why the Trainer could not go on from its own record in a checkpoint; None where it can."""
    file = checkpoint / TRAINER_STATE
    if not os.path.isfile(file):
        return f"it has no {TRAINER_STATE}"
    try:
        is_object = isinstance(read_json(file, is_plain=False), dict)
    except UnreadableTextError as error:
        return f"its {TRAINER_STATE} {error.reason}"
    return None if is_object else f"its {TRAINER_STATE} holds no JSON object"


def explain_fault(checkpoint: Path, fault: str) -> str:
    """Return the sentence for the user on a named checkpoint that is not whole."""
    return (
        f"resume_from_checkpoint={str(checkpoint)!r} is not a complete checkpoint ({fault}): name another one, or "
        "leave it out to take the newest."
    )
