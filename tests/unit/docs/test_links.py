# SPDX-License-Identifier: Apache-2.0
"""Links, pictures and paths in the documents lead somewhere, and every page is in the site's table of contents."""

import re

import pytest
import yaml

from llm_trainer.config.schema import FIELDS
from llm_trainer.config.sections import ALIASES
from support.documents import DOCS, DOCUMENTS, list_anchors, list_code, list_links
from support.measures import ROOT

PATH = re.compile(r"(\.ci|bench|code|docker|docs|examples|tests)/[\w./*-]*")
ASSIGNMENT = re.compile(r"([a-z][a-z0-9_]*)=\S+")
# Not settings, but options of SDKs, fields of SageMaker, keys of the log and parts of commands.
OTHER_NAMES = {
    "code",
    "command",
    "entry_point",
    "entry_script",
    "image_uri",
    "instance_count",
    "instance_type",
    "key",
    "sagemaker_session",
    "source_code",
    "source_dir",
    "training_image",
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_link_leads_somewhere(document):
    for link in list_links(document):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in list_anchors(target), link


@pytest.mark.parametrize("document", sorted(DOCS.glob("*.md")), ids=lambda document: document.name)
def test_a_page_of_the_site_links_to_the_site_alone(document):
    outside = [link for link in list_links(document) if link.startswith("..")]
    assert outside == []  # such a link is dead where the pages are served without the repository


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_path_of_the_repository_is_there(document):
    paths = [piece for piece in list_code(document) if PATH.fullmatch(piece)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_table_of_contents():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = [entry for item in navigation for value in item.values() for entry in as_list(value)]
    pages = [page for entry in entries for page in (entry.values() if isinstance(entry, dict) else [entry])]
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))


def as_list(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_settings_that_are_given_a_value_are_settings(document):
    names = [match[1] for piece in list_code(document) if (match := ASSIGNMENT.fullmatch(piece))]
    assert [name for name in names if name not in {*FIELDS, *ALIASES, *OTHER_NAMES}] == []
