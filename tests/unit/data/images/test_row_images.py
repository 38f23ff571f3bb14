# SPDX-License-Identifier: Apache-2.0
"""The images of a row stand for those of a batch: the tensors that the model's processor makes of them."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import concatenate_datasets

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.data.images.row_images import RowImages, draw_row_images, find_row_images, measure_longest_text
from llm_trainer.readers.images import ImageRules
from llm_trainer.training.methods.answers import AnswerCollator
from support.image_rows import PAIRS, ROWS, build_family_vocabulary, build_vocabulary, prepare_rows, save_pictures
from support.tiny_processors import KINDS

SETTINGS = Settings().data


@pytest.fixture(params=KINDS)
def vocabulary(request, tmp_path):
    save_pictures(tmp_path)
    return build_vocabulary(request.param, tmp_path)


def collate(vocabulary, rows):
    return ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id)(list(rows))


def test_the_row_with_the_most_tokens_of_images_stands_for_all(vocabulary, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS, tmp_path)
    texts, _ = prepare_rows(vocabulary, ROWS[1:2], tmp_path)
    tokens = [sum(placed["tokens"] for placed in row["pictures"]) for row in rows]
    most = tokens.index(max(tokens))
    found = find_row_images([texts, rows, rows.remove_columns("pictures")], vocabulary.images, SETTINGS)
    batch = collate(vocabulary, [rows[most]] * 2)
    expected = {name: value for name, value in batch.items() if name in found.inputs}
    assert {"pixel_values"} <= expected.keys()
    for name, value in found.repeat(2).items():
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype)
        assert value.is_meta == value.is_floating_point()
        assert value.is_meta or torch.equal(value, expected[name])
    assert found.count_bytes(2) == sum(value.nbytes for value in expected.values())
    assert found.mean_share == pytest.approx(sum(tokens) / 4 / max(tokens))


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3"])
def test_a_pair_stands_for_two_rows_of_a_batch(family, tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_family_vocabulary(family, tmp_path)
    rows, _ = prepare_rows(vocabulary, PAIRS[:1], tmp_path, method="dpo")
    found = find_row_images([rows], vocabulary.images, Settings(method="dpo").data)
    pad = vocabulary.tokenizer.pad_token_id
    batch = AnswerCollator(ImageCollator(vocabulary.images, ImageRules(10**7), pad))(list(rows))
    assert found.num_rows == 2 and "pixel_values" in found.inputs
    assert all(value.shape == batch[name].shape for name, value in found.repeat(2).items())


def test_what_a_tower_asks_of_each_row_is_there(tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_family_vocabulary("llava_onevision", tmp_path)
    rows, _ = prepare_rows(vocabulary, ROWS[2:], tmp_path)
    found = find_row_images([rows], vocabulary.images, SETTINGS)
    assert found.repeat(3)["batch_num_images"].tolist() == [2, 2, 2]


def test_rows_are_found_in_many_chunks(vocabulary, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS[1:2] * 3 + ROWS[:1], tmp_path)
    joined = concatenate_datasets([rows.select([0, 1]), rows.select([2, 3])])
    assert find_row_images([joined], vocabulary.images, SETTINGS).count_bytes(1) > 0


def test_the_longest_row_of_text_has_the_white_image_of_a_sharded_training(vocabulary, tmp_path):
    long_text = {"messages": [{"role": "user", "content": "Why? " * 99}, {"role": "assistant", "content": "So."}]}
    rows, _ = prepare_rows(vocabulary, [ROWS[0], ROWS[1], long_text], tmp_path)
    found = find_row_images([rows], vocabulary.images, SETTINGS)
    rules, pad = ImageRules(10**7), vocabulary.tokenizer.pad_token_id
    batch = ImageCollator(vocabulary.images, rules, pad, always_sees=True)([rows[2]])
    assert found.longest_text == batch["input_ids"].shape[1] > rows[2]["length"]
    seeing, _ = prepare_rows(vocabulary, ROWS[:1], tmp_path)
    assert find_row_images([seeing], vocabulary.images, SETTINGS).longest_text == 0


def test_a_pair_of_texts_is_as_long_as_its_longest_answer():
    table = pa.table({"seq_lengths": [[3, 9], [8, 4], [99, 2]], "length": [12, 12, 101]})
    assert measure_longest_text(table, np.array([0.0, 0.0, 5.0])) == 9
    assert measure_longest_text(table, np.ones(3)) == 0


def test_rows_of_texts_have_none(vocabulary, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS[1:2], tmp_path)
    assert find_row_images([rows], vocabulary.images, SETTINGS) is None
    assert find_row_images([rows], None, SETTINGS) is None
    assert RowImages.of(collate(vocabulary, rows)) is None


def test_drawn_images_are_as_large_as_real_ones(vocabulary, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS[:1], tmp_path)
    drawn = draw_row_images(2, (100, 60), vocabulary.images)
    assert drawn.num_tokens == 2 * rows[0]["pictures"][0]["tokens"]
    assert drawn.images.count_bytes(1) == 2 * find_row_images([rows], vocabulary.images, SETTINGS).count_bytes(1)
    with pytest.raises(UserError, match="has no processor"):
        draw_row_images(1, (100, 60), ImageProcessing(str(tmp_path / "none")))
