# SPDX-License-Identifier: Apache-2.0
"""Thumbnails of a page have a bounded room, and what has none is told in words."""

from llm_trainer.readers.thumbnails import MAX_A_ROW, write_thumbnail
from llm_trainer.report import pictures
from llm_trainer.report.pictures import Thumbnails
from support.tiny_processors import draw


def count(described):
    return sum(bool(image["thumbnail"]) for image in described)


def test_all_thumbnails_of_a_page_and_of_a_row_are_bounded(monkeypatch):
    uri = write_thumbnail(draw(400, 300))
    image = {"name": "cat.png", "thumbnail": uri}
    assert count(Thumbnails().describe([image] * 9)) == MAX_A_ROW
    monkeypatch.setattr(pictures, "MAX_BYTES", 2 * len(uri))
    thumbnails = Thumbnails()
    rows = [thumbnails.describe([image]) for _ in range(3)]
    assert [count(row) for row in rows] == [1, 1, 0]
    assert [row[0]["words"] for row in rows] == ["cat.png"] * 3


def test_what_is_no_list_of_images_has_none():
    for found in (None, "cat.png", {"name": "cat.png"}, ["cat.png", None]):
        assert Thumbnails().describe(found) == []
