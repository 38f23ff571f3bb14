# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.journal.manifest import MANIFEST, read_manifest


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
