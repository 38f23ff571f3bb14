# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that a job goes on from can be read, and a named one is whole, before anything starts."""

import json
import os

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.job.checkpoint_dir import complete_checkpoint, describe_files, find_partial_dir, list_files
from llm_trainer.job.kept_checkpoints import find_checkpoint_problems, find_damaged_checkpoint, goes_on
from support.ordinary_user import call_as_user

CUT = ": name another one, or leave it out to take the newest."


def make_checkpoint(folder, step):
    """A complete checkpoint of two files."""
    partial = find_partial_dir(folder) / f"checkpoint-{step}"
    partial.mkdir(parents=True)
    (partial / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (partial / "optimizer.pt").write_bytes(bytes(100))
    return complete_checkpoint(partial, {}, 0, False, describe_files(partial, list_files(partial)))


def find(wish, folder, is_alone=True, use_checkpoints=True):
    settings = Settings(resume_from_checkpoint=wish, use_checkpoints=use_checkpoints).training
    return [list(search(settings, folder, is_alone)) for search in (find_checkpoint_problems, find_damaged_checkpoint)]


def refuse(checkpoint, fault):
    return [f"resume_from_checkpoint={str(checkpoint)!r} is not a complete checkpoint ({fault}){CUT}"]


@pytest.mark.parametrize(
    ("wish", "use_checkpoints", "expected"),
    [(None, True, True), (None, False, False), ("false", True, False), ("/x", False, True), ("true", True, True)],
)
def test_a_job_goes_on_unless_it_is_told_not_to(wish, use_checkpoints, expected):
    assert goes_on(Settings(resume_from_checkpoint=wish, use_checkpoints=use_checkpoints).training) is expected


def test_a_whole_checkpoint_is_taken(tmp_path):
    whole = make_checkpoint(tmp_path, 3)
    for wish in (str(whole), None, "true", "false"):
        assert find(wish, tmp_path) == [[], []]


def test_a_named_one_that_lacks_something(tmp_path):
    whole = make_checkpoint(tmp_path, 3)
    missing = tmp_path / "checkpoint-9"
    assert find(str(missing), tmp_path)[0] == refuse(missing, "it is not there")
    (whole / "optimizer.pt").write_bytes(bytes(99))
    assert find(str(whole), tmp_path)[0] == refuse(whole, "optimizer.pt has 99 of 100 bytes")
    (whole / "optimizer.pt").unlink()
    assert find(str(whole), tmp_path)[0] == refuse(whole, "optimizer.pt is missing")
    assert find(str(whole), tmp_path, is_alone=False) == [[], []]  # another host may have the file
    assert find(None, tmp_path) == [[], []]  # left out with a warning


def test_damage_of_the_same_size_is_found_by_reading(tmp_path):
    whole = make_checkpoint(tmp_path, 3)
    (whole / "optimizer.pt").write_bytes(b"1" * 100)
    assert find(str(whole), tmp_path) == [[], refuse(whole, "optimizer.pt is damaged")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "it has no trainer_state.json"),
        ("[]", "its trainer_state.json holds no JSON object"),
        ("{", "its trainer_state.json is not valid JSON (Expecting property name"),
    ],
)
def test_one_of_another_tool_needs_the_trainers_record(tmp_path, content, fault):
    foreign = tmp_path / "elsewhere/checkpoint-1"
    foreign.mkdir(parents=True)
    if content is not None:
        (foreign / "trainer_state.json").write_text(content)
    (problem,) = find(str(foreign), tmp_path / "own")[0]
    assert f"is not a complete checkpoint ({fault}" in problem


def test_a_job_with_checkpoints_of_its_own_does_not_look_elsewhere(tmp_path):
    make_checkpoint(tmp_path, 3)
    assert find("/not/there/checkpoint-9", tmp_path) == [[], []]


@pytest.mark.parametrize("path", ["checkpoint-3", "checkpoint-3/optimizer.pt"])
def test_one_that_the_user_cannot_read_is_not_passed_over(tmp_path, path):
    whole = make_checkpoint(tmp_path, 3)
    mode = (tmp_path / path).stat().st_mode
    (tmp_path / path).chmod(0)
    try:
        for wish in (str(whole), None):
            settings = Settings(resume_from_checkpoint=wish).training
            (problem,) = call_as_user(lambda given=settings: list(find_checkpoint_problems(given, tmp_path, True)))
            assert problem.startswith(f"{tmp_path / path} cannot be read by user {os.getuid()}: make it readable (`")
        assert call_as_user(lambda: find("false", tmp_path)) == [[], []]
    finally:
        (tmp_path / path).chmod(mode)
