# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.journal.manifest import (
    MANIFEST,
    find_unreadable_manifests,
    list_result_files,
    list_whole_result,
    read_manifest,
)


@pytest.mark.parametrize("manifest", [{"schema_version": 2, "of_a_newer_version": [1]}, {"files": ["a"]}])
def test_every_field_is_kept_with_any_version_or_none(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(tmp_path) == manifest


def test_a_folder_without_a_manifest_has_an_empty_one(tmp_path):
    assert read_manifest(tmp_path) == {}


def test_a_manifest_that_is_cut_off_is_a_mistake_that_names_the_file(tmp_path):
    (tmp_path / MANIFEST).write_text('{"files": [')
    with pytest.raises(UserError, match=f"{MANIFEST} is not valid JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "\xff"])
def test_a_leftover_that_nobody_can_read_lists_nothing_and_is_told_before_the_job(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content, encoding="latin-1")
    assert list_result_files(tmp_path) == []
    (sentence,) = find_unreadable_manifests(tmp_path)
    assert sentence.startswith(f"{tmp_path / MANIFEST} ")
    assert sentence.endswith(f"what an earlier job left in {tmp_path} stays beside the new result; remove it.")


def test_a_manifest_that_is_a_link_or_a_folder_lists_nothing(tmp_path):
    (tmp_path / "elsewhere").write_text(json.dumps({"files": ["elsewhere"]}))
    (tmp_path / MANIFEST).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "adapter" / MANIFEST).mkdir(parents=True)
    assert list_result_files(tmp_path) == list_result_files(tmp_path / "adapter") == []
    assert [sentence.split(": ")[0].split(" ", 1)[1] for sentence in find_unreadable_manifests(tmp_path)] == [
        "is no file"
    ] * 2


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_that_the_first_version_listed_stand_for_the_files_that_it_wrote(tmp_path):
    own = ["adapters/trained/adapter_config.json", "adapters/trained/adapter_model.safetensors"]
    own += ["additional_chat_templates/tool_use.jinja"]
    others = ["adapters/other/adapter_config.json", "adapters/trained/notes", "additional_chat_templates/notes"]
    write(tmp_path, [*own, *others, "config.json"])
    listed = ["adapters", "additional_chat_templates", "config.json", 7, own[0]]
    (tmp_path / MANIFEST).write_text(json.dumps({"files": listed}))
    assert sorted(list_result_files(tmp_path)) == [*own, "config.json"]


def test_a_listed_folder_that_is_a_link_is_not_followed(tmp_path):
    write(tmp_path, ["outside/trained/adapter_config.json", "model/config.json"])
    (tmp_path / "model/adapters").symlink_to(tmp_path / "outside")
    (tmp_path / "model" / MANIFEST).write_text(json.dumps({"files": ["adapters"]}))
    assert "adapters/trained/adapter_config.json" not in list_result_files(tmp_path / "model")


def test_a_whole_result_is_what_both_manifests_list(tmp_path):
    write(tmp_path, ["config.json", "notes", "adapter/adapter_config.json", "adapter/notes"])
    (tmp_path / MANIFEST).write_text(json.dumps({"files": ["config.json", MANIFEST]}))
    (tmp_path / "adapter" / MANIFEST).write_text(json.dumps({"files": ["adapter_config.json"]}))
    assert list_whole_result(tmp_path) == ["adapter/adapter_config.json", "config.json", MANIFEST]
