# SPDX-License-Identifier: Apache-2.0
"""The documents keep the house language, as far as a script can tell, and the README stays short."""

import re

import pytest

from support.documents import CODE, DOCUMENTS, read_prose
from support.language import BANNED, MAX_WORDS, split_sentences
from support.measures import ROOT

MAX_README_LINES = 160
# Items of lists and headings end a sentence, as paragraphs do.
BREAK = re.compile(r"\n(?=\s*([-*]|\d+\.|#+) )|(?<=\n)(#+ .*)\n")


def read_sentences(document):
    """Return the sentences of a document. Rows of tables are none, and a piece of code counts as one word."""
    lines = [line for line in read_prose(document).splitlines() if not line.startswith("|")]
    text = re.sub(r"\]\([^)]*\)", "]", CODE.sub("CODE", "\n".join(lines)))
    return list(split_sentences(BREAK.sub("\n\n", text)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_sentences_are_short(document):
    sentences = (re.findall(r"\S*\w\S*", sentence) for sentence in read_sentences(document))
    assert [" ".join(words) for words in sentences if len(words) > MAX_WORDS] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_no_banned_phrase(document):
    lines = [line for line in document.read_text(encoding="utf-8").splitlines() if "None of" not in line]
    assert [line for line in lines if BANNED.search(line)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
