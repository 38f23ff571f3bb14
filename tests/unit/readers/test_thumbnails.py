# SPDX-License-Identifier: Apache-2.0
"""Thumbnails are small whatever the image is, and nothing else passes for one."""

import pytest
from PIL import Image

from llm_trainer.readers.thumbnails import (
    MAX_CHARACTERS,
    MAX_SIDE,
    PREFIX,
    describe_image,
    is_thumbnail,
    join_images,
    read_thumbnail,
    write_thumbnail,
)
from support.tiny_processors import draw


@pytest.mark.parametrize("size", [(MAX_SIDE, MAX_SIDE), (3000, 1000), (5000, 1), (1, 1)], ids=str)
def test_a_thumbnail_is_bounded_even_of_noise(size):
    image = draw(*size)
    uri = write_thumbnail(image)
    small = read_thumbnail(uri)
    assert is_thumbnail(uri) and len(uri) <= MAX_CHARACTERS
    assert max(small.size) == min(MAX_SIDE, max(size))
    assert image.size == size  # as it was


@pytest.mark.parametrize(
    "uri",
    [
        None,
        7,
        "https://example.com/cat.jpg",
        "javascript:alert(1)",
        "data:image/svg+xml;base64,AAAA",
        f'{PREFIX}AAAA" onerror="alert(1)',
        PREFIX,
        PREFIX + "A" * MAX_CHARACTERS,
    ],
    ids=str,
)
def test_what_is_no_thumbnail_is_not_shown(uri):
    assert not is_thumbnail(uri) and read_thumbnail(uri) is None


@pytest.mark.parametrize("text", ["AAAA", "A"], ids=["no JPEG", "no base64"])
def test_a_thumbnail_that_is_damaged_has_no_pixels(text):
    assert is_thumbnail(PREFIX + text) and read_thumbnail(PREFIX + text) is None


def test_images_stand_side_by_side():
    sheet = join_images([Image.new("RGB", (2, 3), "red"), Image.new("RGB", (4, 1), "blue")])
    assert sheet.size == (6, 3)
    assert [sheet.getpixel(place) for place in ((0, 0), (2, 0), (2, 1))] == [(255, 0, 0), (0, 0, 255), (255,) * 3]
    assert join_images([]).getpixel((0, 0)) == (255,) * 3


def test_an_image_is_described_by_what_is_known_of_it():
    known = {"name": "cat.png", "width": 40, "height": 30, "tokens": 9, "start": 4}
    assert describe_image(known) == "cat.png, 40 x 30 pixels, 9 tokens from token 4 on"
    assert describe_image({}) == "an image"
