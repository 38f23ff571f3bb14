# SPDX-License-Identifier: Apache-2.0
"""A job goes on from a checkpoint of its own run, and from no other."""

from types import SimpleNamespace

import pytest

from llm_trainer import checkpoints, resume
from llm_trainer.errors import UserError

RUN = {"lora_r": 8, "learning_rate": 0.01, "rows a step": 16}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        partial = checkpoints.partial_dir(tmp_path) / f"checkpoint-{step}"
        partial.mkdir(parents=True)
        (partial / "trainer_state.json").write_text("{}")
        checkpoints.complete(
            partial, RUN, 0, False, checkpoints.describe_files(partial, checkpoints.list_files(partial))
        )
    return tmp_path


def choose(folder, run=RUN, resume_from_checkpoint=None, use_checkpoints=True):
    settings = SimpleNamespace(resume_from_checkpoint=resume_from_checkpoint, use_checkpoints=use_checkpoints)
    job = SimpleNamespace(settings=settings, inputs=SimpleNamespace(checkpoint_dir=folder))
    return resume.choose_checkpoint(job, run)


@pytest.mark.parametrize("wish", [None, "true", "True"])
def test_the_newest_is_taken_up(folder, wish):
    assert choose(folder, resume_from_checkpoint=wish) == folder / "checkpoint-2"


def test_none_is_taken_up_where_the_user_wants_none(folder):
    assert choose(folder, resume_from_checkpoint="false") is None
    assert choose(folder, use_checkpoints=False) is None
    assert choose(folder / "empty") is None


def test_an_older_one_is_taken_up_by_name(folder):
    assert choose(folder, resume_from_checkpoint=str(folder / "checkpoint-1")) == folder / "checkpoint-1"


def test_a_start_from_elsewhere_is_not_made_again_after_an_interruption(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("channel") / "checkpoint-9"
    elsewhere.mkdir()
    (elsewhere / "trainer_state.json").write_text("{}")
    assert choose(folder / "empty", resume_from_checkpoint=str(elsewhere)) == elsewhere
    assert choose(folder, resume_from_checkpoint=str(elsewhere)) == folder / "checkpoint-2"


def test_a_broken_one_is_refused_by_name(folder):
    (folder / "checkpoint-1/trainer_state.json").unlink()
    with pytest.raises(
        UserError, match=r"checkpoint-1' is not a complete checkpoint \(trainer_state.json is missing\)"
    ):
        choose(folder, resume_from_checkpoint=str(folder / "checkpoint-1"))
    with pytest.raises(UserError, match=r"is not a complete checkpoint \(it has no trainer_state.json\)"):
        choose(folder, resume_from_checkpoint=str(folder / "checkpoint-7"))


def test_one_of_another_run_is_refused_with_what_differs(folder):
    differs = r"another run \(lora_r was 8 and is 4; rows a step was 16 and is 32\): change that back"
    with pytest.raises(UserError, match=differs):
        choose(folder, run={**RUN, "lora_r": 4, "rows a step": 32})
