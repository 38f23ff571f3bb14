# SPDX-License-Identifier: Apache-2.0
"""The model is found where it leaves no doubt: in a folder below, in a copy of a Hub cache, in an archive."""

import shutil

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.job.model_place import locate_model


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_with_a_model_and_a_hub_id_are_taken_as_they_are(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate_model(str(model)) == str(model)
    assert locate_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert locate_model("x" * 300) == "x" * 300
    (tmp_path / "empty").mkdir()
    assert locate_model("empty") == "empty"


@pytest.mark.parametrize(
    "below", ["a", "a/b", "hub/models--org--name/snapshots/abc", "models--org--name/snapshots/abc"]
)
def test_the_only_model_below_is_taken(model, tmp_path, below):
    place = tmp_path / "channel"
    shutil.copytree(model, place / below)
    (place / "hub/models--org--a/blobs").mkdir(parents=True, exist_ok=True)
    assert locate_model(str(place)) == str(place / below)


def test_of_a_caches_snapshots_main_is_taken(model, tmp_path):
    repository = tmp_path / "channel/models--org--name"
    for revision in ("abc", "def"):
        shutil.copytree(model, repository / "snapshots" / revision)
    with pytest.raises(UserError, match=r"has no config.json, and 2 folders below it have one \(models"):
        locate_model(str(tmp_path / "channel"))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("def\n")
    assert locate_model(str(tmp_path / "channel")) == str(repository / "snapshots/def")


def test_of_several_models_one_must_be_named(model, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(model, tmp_path / "channel" / name)
    with pytest.raises(UserError, match=r"\(checkpoint-1, checkpoint-2\): name one of them, model_id='/"):
        locate_model(str(tmp_path / "channel"))


def test_a_folder_that_holds_itself_by_a_link_is_left(tmp_path):
    (tmp_path / "channel").mkdir()
    (tmp_path / "channel/again").symlink_to(tmp_path / "channel")
    assert locate_model(str(tmp_path / "channel")) == str(tmp_path / "channel")
