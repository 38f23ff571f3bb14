# SPDX-License-Identifier: Apache-2.0
"""The tokens of an image are those of the model's own processor, known by the image's size alone."""

import numpy as np
import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.data.formats.examples import RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK
from llm_trainer.data.images.processing import ImageProcessing, Placeholders, find_part
from llm_trainer.readers.images import ImageRef, ImageRules, Picture
from support.image_rows import build_family_vocabulary
from support.tiny_processors import KINDS, build_processor, draw, save_processor

RULES = ImageRules(10**7)
SIZES = [(28, 28), (60, 100), (100, 60), (31, 640), (640, 31), (64, 64), (65, 65), (500, 333)]


@pytest.fixture(params=KINDS)
def placeholders(request):
    return Placeholders(build_processor(request.param))


def write_alone(placeholders, image):
    return placeholders.process(placeholders.processor.image_token, [image])


def save(folder, height, width, name="a.png"):
    draw(width, height).save(folder / name)
    return Picture(ImageRef(str(folder / name)), height, width)


def test_the_text_of_a_size_is_that_of_each_image_of_it(placeholders, tmp_path):
    for number, size in enumerate(SIZES):
        text = placeholders.write(save(tmp_path, *size, f"{number}.png"), RULES)
        assert text == write_alone(placeholders, draw(size[1], size[0], seed=9))
    assert placeholders.num_compared == 3


def test_sizes_of_the_same_tokens_share_a_text(placeholders, tmp_path):
    texts = [placeholders.write(save(tmp_path, height, 56, f"{height}.png"), RULES) for height in (56, 57, 58)]
    assert texts[0] is texts[1] is texts[2]


def test_only_equal_tokens_are_counted(tmp_path):
    idefics, qwen = (Placeholders(build_processor(kind)) for kind in KINDS)
    assert (idefics.frame, qwen.frame) == (None, ("", ""))


def test_a_processor_whose_count_is_wrong_is_run_for_each_size(placeholders, tmp_path, monkeypatch):
    monkeypatch.setattr(placeholders, "count", lambda size: 5)
    picture = save(tmp_path, 60, 100)
    assert placeholders.frame is None
    assert placeholders.write(picture, RULES) == write_alone(placeholders, draw(100, 60))


def test_a_processor_that_looks_at_the_image_itself_is_refused(placeholders, tmp_path):
    placeholders.texts[60, 100] = "other than that of the image"
    with pytest.raises(UserError, match=r"makes other tokens of the image a\.png than of a white image"):
        placeholders.write(save(tmp_path, 60, 100), RULES)


def refuse(*_, **__):
    raise ValueError("too thin")


def test_a_processor_that_fails_at_any_image_is_refused(monkeypatch):
    processor = build_processor("qwen")
    monkeypatch.setattr(processor, "replace_image_token", refuse)
    with pytest.raises(UserError, match=r"does not tell which tokens an image becomes \(too thin\)"):
        Placeholders(processor)
    monkeypatch.setattr(processor, "replace_image_token", lambda *_, **__: "")
    with pytest.raises(UserError, match="writes no token for an image"):
        Placeholders(processor)


@pytest.mark.parametrize("num_before", [0, 3])
def test_an_image_that_the_processor_does_not_take_makes_a_bad_row(num_before, tmp_path):
    placeholders = Placeholders(build_processor("qwen"))
    for _ in range(num_before):  # the images that are compared
        placeholders.write(save(tmp_path, 60, 100), RULES)
    with pytest.raises(RowError, match=r"has the image a\.png of 5 x 2000 pixels, which the model's Qwen2VLProcessor"):
        placeholders.write(save(tmp_path, 2000, 5), RULES)


def test_spans_move_with_the_text(placeholders, tmp_path):
    pictures = (save(tmp_path, 60, 100, "a.png"), save(tmp_path, 40, 40, "b.png"))
    token = placeholders.processor.image_token
    text = f"one {token} two {IMAGE_MARK} three"
    words = ("one", "two", "three")
    spans = [(text.index(word), text.index(word) + len(word)) for word in words]
    expanded, moved = placeholders.expand(text, spans, pictures, RULES)
    assert tuple(expanded[start:end] for start, end in moved) == words
    first, second = (placeholders.write(picture, RULES) for picture in pictures)
    assert expanded == f"one {first} two {second} three"
    assert placeholders.expand(text, None, pictures, RULES) == (expanded, None)


def test_a_text_with_other_places_than_images_is_told(placeholders, tmp_path):
    token = placeholders.processor.image_token
    with pytest.raises(RowError, match="template writes 2 places for them: take the text"):
        placeholders.expand(f"{token} {token}", None, (save(tmp_path, 60, 100),), RULES)
    with pytest.raises(RowError, match="writes 0 places for them: give a chat_template_path whose template writes"):
        placeholders.expand("no place", None, (save(tmp_path, 60, 100),), RULES)


def test_images_are_found_among_the_tokens_of_their_row(placeholders, tmp_path):
    pictures = (save(tmp_path, 60, 100, "a.png"), save(tmp_path, 60, 100, "b.png"), save(tmp_path, 40, 40, "c.png"))
    text, _ = placeholders.expand(f"x{IMAGE_MARK * 2}y{IMAGE_MARK}z", None, pictures, RULES)
    tokenizer = placeholders.processor.tokenizer
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    spans = placeholders.locate(ids, pictures)
    for (start, end), picture in zip(spans, pictures, strict=True):
        assert np.array_equal(ids[start:end], placeholders.find_tokens(picture))
    kept = np.ones(len(ids), dtype=bool)
    for start, end in spans:
        kept[start:end] = False
    assert tokenizer.decode(ids[kept]) == "xyz"
    with pytest.raises(RowError, match="whose tokens join those of its text"):
        placeholders.locate(ids[:-20], pictures)


@pytest.mark.parametrize(("family", "tokens"), [("idefics2", 4), ("llava_onevision", 17)])
@pytest.mark.parametrize("between", ["", " and "])
def test_images_that_depend_on_each_other_are_told_apart(family, tokens, between, tmp_path):
    placeholders = build_family_vocabulary(family, tmp_path).images.placeholders
    sizes = ((60, 100), (90, 40), (60, 100))
    pictures = tuple(save(tmp_path, *size, f"{number}.png") for number, size in enumerate(sizes))
    text, _ = placeholders.expand(between.join([IMAGE_MARK] * 3), None, pictures, RULES)
    ids = placeholders.tokenize(text)
    places = placeholders.locate(ids, pictures)
    assert [int(np.isin(ids[start:end], placeholders.image_tokens).sum()) for start, end in places] == [tokens] * 3


def test_a_processor_that_changes_a_text_beside_many_images_is_told(tmp_path):
    placeholders = build_family_vocabulary("idefics2", tmp_path).images.placeholders
    pictures = (save(tmp_path, 60, 100),) * 20
    text = f" {IMAGE_MARK}" * 20
    assert placeholders.expand(text, None, pictures, RULES)[0].startswith(" <fake_token_around_image>")
    with pytest.raises(RowError, match="whose processor changes the text beside them: put a space around each"):
        placeholders.expand(f"{text} {'<fake_token_around_image>' * 2}", None, pictures, RULES)


def test_a_part_is_found_behind_a_place():
    ids, part = np.array([1, 2, 1, 2, 3, 1], dtype=np.int32), np.array([1, 2], dtype=np.int32)
    assert [find_part(ids, part, begin) for begin in range(7)] == [0, 2, 2, -1, -1, -1, -1]


def test_the_fingerprint_is_that_of_the_processors_files(tmp_path):
    save_processor("qwen", tmp_path)
    first = ImageProcessing(str(tmp_path)).fingerprint
    assert ImageProcessing(str(tmp_path)).fingerprint == first
    assert ImageProcessing(str(tmp_path), options={"max_pixels": 784}).fingerprint != first
    config = tmp_path / "processor_config.json"
    config.write_text(config.read_text().replace("14", "16"))
    assert ImageProcessing(str(tmp_path)).fingerprint != first
