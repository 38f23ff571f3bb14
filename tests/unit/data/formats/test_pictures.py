# SPDX-License-Identifier: Apache-2.0
"""Images of a row are found wherever it has them, and each of them stands where the row puts it."""

import base64

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.detection import UntakenImagesError, detect_format, list_read_fields, parse_example
from llm_trainer.data.formats.examples import RowError
from llm_trainer.data.formats.pictures import IMAGE_MARK, drop_added_marks, refuse_marks, split_parts
from llm_trainer.readers.rows import FilePart

ANSWER = {"role": "assistant", "content": "A cat."}
SIDES = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Yes."), ("rejected", "No."))}
BYTES = b"\x89PNG"
UNFILLED = {"bytes": None, "path": None}


def parse(fields, method="sft"):
    settings = Settings(method=method).data
    return parse_example(fields, detect_format(fields, settings), settings, True)


def find_problem(fields, method="sft"):
    with pytest.raises(RowError) as error:
        parse(fields, method)
    return str(error.value)


def ask(content, **fields):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


def look(content, **fields):
    """The question with M for each image, and the images."""
    example = parse(ask(content, **fields))
    assert all(set(message) == {"role", "content"} for message in example.messages)
    return example.messages[0]["content"].replace(IMAGE_MARK, "M"), example.images


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "image": BYTES}, BYTES),
        ({"type": "image", "image": {"bytes": BYTES, "path": None}}, BYTES),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "a.png"),
        ({"type": "image", "path": "a.png", "text": None}, "a.png"),
        ({"type": "image", "url": "https://host/a.png"}, "https://host/a.png"),
        ({"type": "image", "base64": "QUJD"}, "data:image;base64,QUJD"),
        ({"type": "image", "base64": "DATA:image/png;base64,QUJD"}, "DATA:image/png;base64,QUJD"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}, "data:image/png;base64,QUJD"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "input_image", "image_url": "a.png"}, "a.png"),
    ],
)
def test_a_part_with_an_image_stands_where_it_is(part, value):
    assert look([{"type": "text", "text": "Is "}, part, {"type": "text", "text": " red?"}]) == ("Is M red?", (value,))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (["a.png"], ("a.png",)),
        ("a.png", ("a.png",)),
        ('["a.png"]', ("a.png",)),
        ([{"bytes": BYTES, "path": "a.png"}], (BYTES,)),
        ({"bytes": "BM text", "path": None}, (b"BM text",)),
    ],
)
@pytest.mark.parametrize("name", ["images", "image"])
@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("Is <image> red?", "Is M red?"),
        ([{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}], "Is M red?"),
        ([{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "Red?"}], "MRed?"),
        ([{"type": "image", "image": UNFILLED}, {"type": "text", "text": "Red?"}], "MRed?"),
        ("Red?", "MRed?"),
    ],
)
def test_a_column_fills_the_placeholders(column, values, name, content, seen):
    assert look(content, **{name: column}) == (seen, values)


def test_a_part_of_a_shard_is_an_image():
    part = FilePart("a.tar", 0, 9, "a.tar:1.png")
    assert look("<image>?", images=[part]) == ("M?", (part,))


def test_images_keep_their_order_over_messages_and_places():
    own = {"type": "image", "image": "own.png"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "<image> and "}, own, {"type": "image"}]},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "And <image>?"},
        ANSWER,
    ]
    example = parse({"messages": messages, "images": ["1.png", "2.png", "3.png"]})
    assert example.images == ("1.png", "own.png", "2.png", "3.png")
    assert [message["content"].count(IMAGE_MARK) for message in example.messages] == [3, 0, 1, 0]


def test_other_formats_have_images_too():
    rows = [
        {
            "conversations": [{"from": "human", "value": "<image>\nRed?"}, {"from": "gpt", "value": "Yes."}],
            "image": "a",
        },
        {"instruction": "<image>\nRed?", "output": "Yes.", "images": ["a"]},
        {"prompt": [{"role": "user", "content": "<image>\nRed?"}], "completion": [ANSWER], "images": ["a"]},
    ]
    for row in rows:
        example = parse(row)
        assert (example.messages[0]["content"], example.images) == (f"{IMAGE_MARK}\nRed?", ("a",))
        settings = Settings().data
        assert {"images", "image"} <= list_read_fields(detect_format(row, settings), settings, True)
    text = parse({"text": "A cat.", "images": ["a"]})
    assert (text.text, text.images) == (f"{IMAGE_MARK}A cat.", ("a",))
    text = parse({"prompt": "<image>Red? ", "completion": "Yes.", "images": ["a"]})
    assert (text.text, text.num_prompt_characters) == (f"{IMAGE_MARK}Red? Yes.", len(f"{IMAGE_MARK}Red? "))


@pytest.mark.parametrize("fields", [{"images": []}, {"images": None}, {"image": ""}, {"image": UNFILLED}])
def test_without_images_a_text_stays_as_it_is(fields):
    assert look("Write <image>") == ("Write <image>", ())
    assert look("Write", **fields) == ("Write", ())


@pytest.mark.parametrize("fields", [{"images": []}, {"images": None}, {"image": ""}])
def test_an_empty_column_leaves_no_placeholder(fields):
    """A table may lose an image. Its question would be trained on without it."""
    assert "has the text <image> and nothing in its column of images" in find_problem(ask("<image>\nRed?", **fields))
    assert "has the text <image>" in find_problem({"text": "A <image>", **fields})
    assert "has the text <image>" in find_problem({"prompt": "<image>?", **SIDES, **fields}, "dpo")
    assert parse({"text": "A cat.", **fields}).text == "A cat."


@pytest.mark.parametrize(
    ("content", "images", "reason"),
    [
        ("<image> <image>", ["a"], "has 1 images and 2 placeholders for them"),
        ("<image>", ["a", "b"], "has 2 images and 1 placeholders for them"),
        ([{"type": "image"}], None, "has 0 images and 1 placeholders for them"),
        ("<image>", [7], "has an image that is a number"),
        ("<image>", [{"bytes": None, "path": None}], "has an image that is an object without bytes, url and path"),
        ([{"type": "image", "image": {"x": 1}}], None, "has an image that is an object without bytes, url and path"),
        ("<image>", [None], "has an image that is null"),
    ],
)
def test_images_and_placeholders_that_do_not_match_are_told(content, images, reason):
    assert reason in find_problem(ask(content, images=images))


def test_a_row_without_a_question_has_no_place_for_its_images():
    assert "no message of a user" in find_problem({"messages": [ANSWER], "images": ["a"]})
    texts = {"text": "<image> <image>", "images": ["a"]}
    assert "has 1 images and 2 placeholders for them" in find_problem(texts)


@pytest.mark.parametrize(
    ("method", "row"),
    [
        (
            "reward",
            {"prompt": ask([{"type": "image", "image": "a"}])["messages"][:1], "chosen": "Yes.", "rejected": "No."},
        ),
        ("kto", {"prompt": "Red?", "completion": "Yes.", "label": True, "images": ["a"]}),
        ("reward", {"prompt": "Red?", "chosen": "Yes.", "rejected": "No.", "image": "a"}),
        ("distill", ask([{"type": "image", "image": "a"}])),
        ("distill", {"text": "Red", "images": ["a"]}),
        ("grpo", {"prompt": ask([{"type": "image", "image": "a"}])["messages"][:1]}),
        ("rloo", {"question": "Red?", "images": ["a"]}),
    ],
)
def test_other_methods_refuse_images(method, row):
    with pytest.raises(UntakenImagesError, match=f"has images, which method={method} does not take: set method=sft"):
        parse(row, method)


@pytest.mark.parametrize("value", ["b.png", ["b.png"], '["b.png"]', {"path": "b.png"}])
def test_a_row_with_both_columns_is_refused(value):
    assert "has images in both columns 'images' and 'image'" in find_problem(ask("Red?", images=["a.png"], image=value))
    assert look("Red?", images=["a.png"], image=None) == look("Red?", images=[], image="a.png") == ("MRed?", ("a.png",))


@pytest.mark.parametrize(
    "fields",
    [
        {"text": f"a{IMAGE_MARK}"},
        ask(IMAGE_MARK),
        ask([{"type": "text", "text": IMAGE_MARK}, {"type": "image", "image": "a.png"}]),
        ask("<image>", tools=[{"name": IMAGE_MARK}], images=["a.png"]),
        {"messages": [{"role": "user", "content": "Red?", IMAGE_MARK: ["a.png"]}, ANSWER]},
    ],
)
def test_the_characters_of_a_mark_are_refused_in_a_row(fields):
    with pytest.raises(RowError, match=r"has the private characters '\\ue7c3\\ue7a8\\ue7c3' in a text"):
        refuse_marks(fields)


def test_a_row_without_marks_is_taken():
    refuse_marks(ask("Red?", images=["a.png"], n=1, none=None, parts=[b"a", {"b": [1.0]}]))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<pad>", "<pad>"),
        ("Is <s><pad></s> red?", "Is <s><pad></s> red?"),
        ("Red?", "MRed?"),
        ("Is <image> <pad> red?", "Is M <pad> red?"),
        ("<pad> and <pad>", "M<pad> and <pad>"),
    ],
)
def test_the_models_own_token_of_an_image_is_a_place_for_it(text, seen):
    plain = drop_added_marks(parse({"text": text, "images": ["a.png"]}), "<pad>")
    assert (plain.text.replace(IMAGE_MARK, "M"), plain.images) == (seen, ("a.png",))
    pair = drop_added_marks(parse({"prompt": text, "completion": "Yes.", "images": ["a.png"]}), "<pad>")
    assert pair.text[: pair.num_prompt_characters].replace(IMAGE_MARK, "M") == seen


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ask([{"type": "image", "image": "a"}, {"type": "text", "text": "Red?"}])["messages"][:1]},
        {"prompt": ask("Red?")["messages"][:1], "images": ["a"]},
        {"prompt": "<image>Red?", "images": ["a"]},
        {"prompt": "Red?", "image": "a"},
    ],
)
def test_both_sides_of_a_pair_have_the_images_of_its_prompt(row):
    answers = {"chosen": "Yes.", "rejected": "No."} if isinstance(row["prompt"], str) else SIDES
    pair = parse({**row, **answers}, "dpo")
    for side, answer in ((pair.chosen, "Yes."), (pair.rejected, "No.")):
        assert side.images == ("a",)
        texts = [turn["content"] for turn in side.messages] if isinstance(row["prompt"], list) else [side.text]
        assert "".join(texts) == f"{IMAGE_MARK}Red?{answer}"


def test_a_pair_needs_a_place_for_each_image():
    with pytest.raises(RowError, match="has 1 images and 2 placeholders for them"):
        parse({"prompt": "<image><image>Red?", "chosen": "Yes.", "rejected": "No.", "images": ["a"]}, "dpo")


def test_a_text_with_marks_becomes_parts():
    assert split_parts(f"a{IMAGE_MARK}b") == [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "text", "text": "b"},
    ]
    assert split_parts("") == [{"type": "text", "text": ""}]


def test_base64_in_a_part_is_what_was_encoded():
    encoded = base64.b64encode(BYTES).decode()
    _, (uri,) = look([{"type": "image", "base64": encoded}])
    assert uri.endswith(encoded)
