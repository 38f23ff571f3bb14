# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.journal.manifest import MANIFEST, find_unreadable_manifests, list_result_files, read_manifest


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
