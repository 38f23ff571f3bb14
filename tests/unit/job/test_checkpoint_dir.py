# SPDX-License-Identifier: Apache-2.0
"""Only whole checkpoints count, whatever half of one a kill or a synchronization leaves behind."""

import json

import pytest

from llm_trainer.job import checkpoint_dir
from support.hostile_files import HOSTILE

RUN = {"seed": 42}


def describe(folder):
    return checkpoint_dir.describe_files(folder, checkpoint_dir.list_files(folder))


def write(folder, step, limit=None):
    """A checkpoint of two files, written the way the trainer does."""
    partial = checkpoint_dir.find_partial_dir(folder) / f"checkpoint-{step}"
    (partial / "below").mkdir(parents=True)
    (partial / "weights").write_bytes(b"w" * 100)
    (partial / "below/state").write_bytes(b"s" * 100)
    final = checkpoint_dir.complete_checkpoint(partial, RUN, step * 10, False, describe(partial))
    if limit:
        checkpoint_dir.rotate_checkpoints(final, limit, None)
    return final


def names(folder):
    return [checkpoint.name for checkpoint in checkpoint_dir.list_checkpoints(folder)]


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    newest, warnings = checkpoint_dir.find_newest(tmp_path)
    assert newest == tmp_path / "checkpoint-100"
    assert not warnings
    assert checkpoint_dir.read_marker(newest).num_tokens == 1000


def test_no_folder_and_an_empty_one_hold_none(tmp_path):
    assert checkpoint_dir.find_newest(tmp_path / "absent") == (None, [])
    assert checkpoint_dir.find_newest(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda file: file.write_bytes(b"s" * 99), "below/state has 99 of 100 bytes"),
        (lambda file: file.write_bytes(b""), "below/state has 0 of 100 bytes"),
        (lambda file: file.write_bytes(b"x" * 100), "below/state is damaged"),
        (lambda file: file.unlink(), "below/state is missing"),
        (lambda file: (file.parents[1] / "complete.json").unlink(), "it has no readable complete.json"),
        (lambda file: (file.parents[1] / "complete.json").write_text('{"step": 2'), "it has no readable complete.json"),
        (
            lambda file: (file.parents[1] / "complete.json").write_text('{"step": 2}'),
            "it has no readable complete.json",
        ),
        (lambda file: (file.parents[1] / "complete.json").write_bytes(b"\xff\xfe"), "it has no readable complete.json"),
    ],
)
def test_the_one_before_a_broken_one_is_used(tmp_path, damage, fault):
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / "below/state")
    newest, (warning,) = checkpoint_dir.find_newest(tmp_path)
    assert newest == tmp_path / "checkpoint-1"
    assert warning.startswith(f"Warning: {tmp_path}/checkpoint-2 is left out, {fault}")


def test_what_is_half_written_is_not_found_and_is_cleaned_away(tmp_path):
    partial = checkpoint_dir.find_partial_dir(tmp_path) / "checkpoint-3"
    partial.mkdir(parents=True)
    (partial / "weights").write_bytes(b"w")
    assert checkpoint_dir.find_newest(tmp_path) == (None, [])
    checkpoint_dir.remove_partial_checkpoints(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (write(tmp_path, 1) / "weights").unlink()
    assert checkpoint_dir.find_fault(write(tmp_path, 1)) is None


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint_dir.rotate_checkpoints(tmp_path / "checkpoint-3", 2, best=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-1"]


def test_rotation_never_counts_what_cannot_be_resumed_from(tmp_path):
    write(tmp_path, 1)
    for step in (2, 7):  # broken; 7 is of a future that was given up
        (write(tmp_path, step) / "complete.json").unlink()
    write(tmp_path, 8)
    write(tmp_path, 3, limit=2)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-7", "checkpoint-3", "checkpoint-2", "checkpoint-1"]
    write(tmp_path, 4, limit=1)
    assert checkpoint_dir.find_fault(tmp_path / "checkpoint-4") is None
    assert "checkpoint-1" not in names(tmp_path)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "notes").mkdir()
    write(tmp_path, 1)
    write(tmp_path, 2, limit=1)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-best", "notes", "checkpoint-2", ".partial"}


@pytest.mark.parametrize("name", ["../victim", "/etc/hostname", "below/../../victim", "", "a\0b"])
def test_a_list_that_names_files_outside_its_checkpoint_is_none(tmp_path, name):
    write(tmp_path, 1)
    marker = write(tmp_path, 2) / "complete.json"
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"files": content["files"] | {name: [1, "0"]}}))
    assert checkpoint_dir.find_newest(tmp_path)[0] == tmp_path / "checkpoint-1"


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"},
        {"step": None},
        {"step": True},
        {"num_tokens": -1},
        {"evaluation_due": 1},
        {"run": []},
        {"files": ["optimizer.pt"]},
        {"files": {"optimizer.pt": None}},
        {"files": {"optimizer.pt": [1]}},
        {"files": {"optimizer.pt": ["1", "0"]}},
        {"files": {"optimizer.pt": [1, 0]}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_marker_with_other_values_is_none(tmp_path, change):
    write(tmp_path, 1)
    marker = write(tmp_path, 2) / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | change))
    assert checkpoint_dir.read_marker(marker.parent) is None
    assert checkpoint_dir.find_newest(tmp_path)[0] == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_marker_is_none(tmp_path, content):
    (write(tmp_path, 1) / "complete.json").write_bytes(content)
    newest, (warning,) = checkpoint_dir.find_newest(tmp_path)
    assert newest is None
    assert "it has no readable complete.json" in warning


def test_what_links_name_stays(tmp_path):
    folder, outside = tmp_path / "checkpoints", tmp_path / "outside"
    write(outside, 1)
    folder.mkdir()
    (folder / "checkpoint-1").symlink_to(outside / "checkpoint-1")
    checkpoint_dir.find_partial_dir(folder).symlink_to(outside)
    checkpoint_dir.remove_partial_checkpoints(folder)
    assert not checkpoint_dir.find_partial_dir(folder).exists()
    write(folder, 2, limit=1)
    (folder / "checkpoint-3").symlink_to(tmp_path / "nowhere")
    write(folder, 3)
    assert names(folder) == ["checkpoint-3", "checkpoint-2"]
    assert not (folder / "checkpoint-3").is_symlink()
    assert checkpoint_dir.find_fault(outside / "checkpoint-1") is None
