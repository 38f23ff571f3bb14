# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures come again, show what their answers say, and none is held out and trained on. Its model loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

DEMO = Path(__file__).parents[3] / "examples/demo"
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}


def run(program, *options):
    subprocess.run([sys.executable, DEMO / program, *options], check=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    run("make_pictures.py", folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    run("make_vision_model.py", folder)
    return folder


def read_rows(folder, split):
    """The picture, as an array [height, width, 3], and the answer of each row."""
    rows = [json.loads(line) for line in (folder / split / f"{split}.jsonl").read_text().splitlines()]
    return [(np.asarray(Image.open(folder / split / row["images"][0])), row["messages"][1]["content"]) for row in rows]


def count_shapes(is_shape):
    """The number of areas [height, width] that do not touch each other."""
    left, count = set(zip(*np.nonzero(is_shape), strict=True)), 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge += near
    return count


def see(picture):
    """The answer, found by another way than the program's: by areas that are not grey, and their strong colours."""
    values = picture.astype(int)
    is_shape = values.max(axis=2) - values.min(axis=2) > 0
    strong = tuple(values[is_shape].mean(axis=0) > 120)
    return f"{count_shapes(is_shape)} {next(name for name, parts in COLOURS.items() if parts == strong)}"


def test_the_same_pictures_come_again(pictures, tmp_path):
    run("make_pictures.py", tmp_path)
    first, second = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")} for folder in (pictures, tmp_path)
    )
    assert first == second
    assert len(first) == 6000 + 64 + 320 + 3


def test_pictures_show_what_their_answers_say(pictures):
    rows = read_rows(pictures, "heldout") + read_rows(pictures, "train")[:200]
    assert [see(picture) for picture, _ in rows] == [answer for _, answer in rows]


def test_no_answer_is_more_frequent_than_another(pictures):
    answers = [answer for _, answer in read_rows(pictures, "heldout")]
    assert {answers.count(answer) for answer in answers} == {20}


def test_no_picture_comes_twice(pictures):
    drawn = [
        picture.tobytes() for split in ("train", "validation", "heldout") for picture, _ in read_rows(pictures, split)
    ]
    assert len(set(drawn)) == len(drawn)


def test_the_model_loads_and_all_of_it_can_learn_from_a_picture(pictures, model_dir):
    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    picture = Image.open(pictures / "train/0000.png")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes?"}]}
    text = processor.apply_chat_template([question], add_generation_prompt=True)
    inputs = processor(text=text, images=[picture], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 3, 64, 64)
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == "User:\nHow many shapes?\nAssistant:\n"
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())


def test_a_word_of_an_answer_is_a_token(model_dir):
    tokenizer = AutoProcessor.from_pretrained(model_dir).tokenizer
    assert [tokenizer.decode(token) for token in tokenizer("3 yellow")["input_ids"]] == ["3", " yellow"]
