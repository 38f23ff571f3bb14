# SPDX-License-Identifier: Apache-2.0
"""A batch of rows is what the model's own processor gives for the same conversations."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llm_trainer.common.errors import UserError
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.readers.images import ImageRules
from support.image_rows import CONVERSATIONS, ROWS, build_vocabulary, prepare_rows, save_pictures
from support.tiny_processors import KINDS, draw, read_template
from support.tiny_vision_models import build_vision_model

LONGER = {"messages": [{"role": "user", "content": "Who " * 9}, {"role": "assistant", "content": "Me, and you."}]}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def vocabulary(kind, tmp_path):
    save_pictures(tmp_path)
    return build_vocabulary(kind, tmp_path)


def collate(vocabulary, rows, **options):
    pad = vocabulary.tokenizer.pad_token_id
    return ImageCollator(vocabulary.images, ImageRules(10**7), pad, **options)(list(rows))


def process(vocabulary, kind, conversations, **options):
    return vocabulary.images.processor.apply_chat_template(
        conversations,
        chat_template=read_template(kind, "_training"),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False, **options},
    )


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0], [0], [2], [0, 1, 1], [1]])
def test_a_batch_is_what_the_processor_gives(vocabulary, kind, places, tmp_path):
    rows, report = prepare_rows(vocabulary, ROWS, tmp_path)
    assert (report.num_rows, report.num_images, report.num_rows_with_images) == (3, 3, 2)
    batch = collate(vocabulary, (rows[place] for place in places))
    expected = dict(process(vocabulary, kind, [CONVERSATIONS[place] for place in places]))
    mask = expected.pop("assistant_masks")
    expected["labels"] = torch.where(mask == 1, expected["input_ids"], IGNORED)
    if places == [1]:  # a text has no image to tell apart
        expected.pop("mm_token_type_ids", None)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
        assert batch[name].dtype == value.dtype, name


def test_no_token_of_an_image_is_trained_on(vocabulary, kind, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS, tmp_path, assistant_only_loss=False)
    for row in rows:
        labels = np.array(row["labels"])
        taken = np.zeros(len(labels), dtype=bool)
        for placed in row["pictures"]:
            taken[placed["start"] : placed["start"] + placed["tokens"]] = True
        assert ((labels == IGNORED) == taken).all()
        image_token = vocabulary.images.image_token_id
        assert not (np.array(row["input_ids"])[~taken] == image_token).any()


def test_rows_are_padded_to_a_multiple(vocabulary, kind, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS, tmp_path)
    batch = collate(vocabulary, rows, pad_to_multiple_of=64)
    assert batch["input_ids"].shape[1] % 64 == 0
    plain = collate(vocabulary, rows)
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])
    assert torch.equal(batch["labels"][:, : plain["labels"].shape[1]], plain["labels"])


@pytest.mark.parametrize("size", [(300, 20), (20, 300)])
def test_an_image_that_has_changed_or_gone_is_told(vocabulary, kind, tmp_path, size):
    rows, _ = prepare_rows(vocabulary, ROWS[:1], tmp_path)
    draw(*size).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"the image 0\.png, of another size than when the data were read"):
        collate(vocabulary, rows)
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"A row has the image 0\.png, which cannot be read"):
        collate(vocabulary, rows)


def test_images_that_have_changed_places_are_told(vocabulary, kind, tmp_path):
    one, other = tmp_path / "0.png", tmp_path / "1.png"
    draw(28, 112).save(one)
    draw(56, 28).save(other)
    row = {**ROWS[0], "images": ["0.png", "1.png"]}
    row = {**row, "messages": [{"role": "user", "content": "<image><image>"}, *row["messages"][1:]]}
    rows, _ = prepare_rows(vocabulary, [row], tmp_path)
    one.rename(tmp_path / "2.png")
    other.rename(one)
    (tmp_path / "2.png").rename(other)
    with pytest.raises(UserError, match=r"the image 0\.png, the image 1\.png, of another size"):
        collate(vocabulary, rows)


def test_batches_are_made_in_processes_beside(vocabulary, kind, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS, tmp_path)
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id)
    beside = list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=collator))
    for batch, places in zip(beside, ([0, 1], [2]), strict=True):
        own = collator([rows[place] for place in places])
        assert batch.keys() == own.keys()
        assert all(torch.equal(batch[name], own[name]) for name in own)


def compute_loss(vocabulary, kind, batch):
    """The loss of a batch, and the gradients of all weights."""
    model = build_vision_model(kind, vocabulary.images.processor).train()
    inputs = {name: value for name, value in batch.items() if name != "num_tokens"}
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss, dict(model.named_parameters())


def test_a_batch_of_texts_has_the_gradients_of_its_texts_though_it_sees_a_white_image(vocabulary, kind, tmp_path):
    rows, _ = prepare_rows(vocabulary, [ROWS[1], LONGER], tmp_path)
    plain, seeing = collate(vocabulary, rows), collate(vocabulary, rows, always_sees=True)
    assert next(iter(seeing)) == "num_tokens"
    assert seeing["num_tokens"].tolist() == plain["attention_mask"].sum(-1).tolist()
    assert (seeing["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()
    assert "pixel_values" in seeing and "pixel_values" not in plain
    (loss, found), (expected_loss, expected) = (compute_loss(vocabulary, kind, batch) for batch in (seeing, plain))
    assert torch.allclose(loss, expected_loss)
    for name, weight in found.items():
        assert weight.grad is not None, f"{name} has no gradient, and other ranks wait for it"
        other = expected[name].grad
        torch.testing.assert_close(weight.grad, torch.zeros_like(weight) if other is None else other, msg=name)


def test_a_batch_with_an_image_gets_no_white_one(vocabulary, kind, tmp_path):
    rows, _ = prepare_rows(vocabulary, ROWS[:2], tmp_path)
    plain, seeing = collate(vocabulary, rows), collate(vocabulary, rows, always_sees=True)
    assert plain.keys() == seeing.keys()
    assert torch.equal(plain["pixel_values"], seeing["pixel_values"])
