# SPDX-License-Identifier: Apache-2.0
"""A row with images as a person reads it."""

from datasets import Dataset

from llm_trainer.data.images.shown import decode_pieces, find_shown_row, replace_images, show_images
from llm_trainer.readers.images import ImageRules
from support.tiny_model import build_tokenizer
from support.tiny_processors import draw

RULES = ImageRules(10**7)
IMAGE = {"path": "", "offset": 0, "size": 0, "data": b"", "name": "", "start": 1, "tokens": 2}


def test_the_first_row_with_images_is_shown_else_the_first():
    texts = Dataset.from_list([{"input_ids": [1]}, {"input_ids": [2]}])
    seen = Dataset.from_list([{"input_ids": [3], "pictures": []}, {"input_ids": [4], "pictures": [IMAGE]}])
    assert find_shown_row([texts]) == {"input_ids": [1]}
    assert find_shown_row([texts, seen])["input_ids"] == [4]
    assert find_shown_row([seen.select([0])])["input_ids"] == [3]
    assert find_shown_row([]) is None


def test_words_stand_in_place_of_the_tokens_of_images():
    tokenizer = build_tokenizer()
    ids = tokenizer("abcdefg")["input_ids"]
    images = [{"name": "0.png", "start": 1, "tokens": 2}, {"name": "1.png", "start": 5, "tokens": 1}]
    text = decode_pieces(replace_images(ids, images, str), tokenizer)
    assert text == "a[image 1: 0.png, 2 tokens from token 1 on]de[image 2: 1.png, 1 tokens from token 5 on]g"
    assert decode_pieces(replace_images(ids, [], str), tokenizer) == "abcdefg"


def test_later_images_are_told_without_a_thumbnail(tmp_path):
    draw(30, 20).save(tmp_path / "a\x1b.png")
    placed = {**IMAGE, "path": str(tmp_path / "a\x1b.png")}
    shown = show_images([placed] * 6, RULES, 9)
    assert ["thumbnail" in image for image in shown] == [True] * 4 + [False] * 2
    assert {(image["width"], image["height"]) for image in shown} == {(30, 20)}
    assert "\x1b" not in shown[0]["name"]
    assert ["thumbnail" in image for image in show_images([placed] * 2, RULES, 1)] == [True, False]
