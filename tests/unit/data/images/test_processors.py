# SPDX-License-Identifier: Apache-2.0
"""Processors of images load from a model's folder, and one that cannot is told by a sentence."""

import json

import numpy as np
import pytest
import torch
from transformers.image_processing_backends import PilBackend

from llm_trainer.common.errors import UserError
from llm_trainer.data.images import processors
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.data.images.processors import has_torchvision, load_processor, process_images
from support.image_families import FAMILIES, save_family
from support.tiny_model import build_tokenizer
from support.tiny_processors import KINDS, build_processor, draw, save_processor

UNAVAILABLE = [name for name, family in FAMILIES.items() if family.needs_torchvision and not has_torchvision()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_is_read_from_the_models_folder(kind, tmp_path):
    assert type(save_processor(kind, tmp_path)) is type(ImageProcessing(str(tmp_path)).processor)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_that_lie_by_channel_have_the_same_numbers(kind, monkeypatch):
    monkeypatch.setattr(PilBackend, "rescale", processors.rescale)
    images, image = build_processor(kind).image_processor, draw(100, 60)
    by_pixel = np.asarray(image).transpose(2, 0, 1)
    expected = images(image, return_tensors="pt")["pixel_values"]
    assert not images.rescale(by_pixel, 0.5).flags.c_contiguous
    processors.lay_out_by_channel()
    assert torch.equal(images(image, return_tensors="pt")["pixel_values"], expected)
    assert images.rescale(by_pixel, 0.5).flags.c_contiguous


@pytest.mark.parametrize("options", [{"max_pixels": 3136}, {"size": {"shortest_edge": 784, "longest_edge": 3136}}])
def test_options_have_an_image_take_fewer_tokens(tmp_path, options):
    save_processor("qwen", tmp_path)
    sides = [ImageProcessing(str(tmp_path), options=own).placeholders.count((336, 336)) for own in ({}, options)]
    assert sides == [16, 4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_pixel": 1}, "has 'max_pixel', which .* does not take: the nearest that it takes is 'max_pixels'"),
        ({"size": {"longest_edge": 784}}, "is refused by the model's Qwen2VLImageProcessor"),
        ({"size": "large"}, "is refused by the model's Qwen2VLImageProcessor"),
    ],
)
def test_options_that_a_processor_does_not_take_are_told(tmp_path, options, reason):
    save_processor("qwen", tmp_path)
    with pytest.raises(UserError, match=f"^image_processor_options.* {reason}"):
        ImageProcessing(str(tmp_path), options=options).placeholders  # noqa: B018


def test_an_option_that_a_processor_sets_itself_is_told(tmp_path):
    save_family("gemma3", tmp_path)
    with pytest.raises(UserError, match="'do_pan_and_scan', which the model's Gemma3Processor itself sets"):
        load_processor(str(tmp_path), False, {"do_pan_and_scan": True})


def test_a_folder_without_a_processor_is_told(tmp_path):
    with pytest.raises(UserError, match="has no processor for them"):
        ImageProcessing(str(tmp_path)).placeholders  # noqa: B018
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the processor of .* could not be loaded"):
        ImageProcessing(str(tmp_path)).placeholders  # noqa: B018


def test_a_processor_that_needs_torchvision_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_trainer.data.images.processors.has_torchvision", lambda: False)

    def refuse(*_, **__):
        raise ImportError("PixtralProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("llm_trainer.data.images.processors.AutoProcessor.from_pretrained", refuse)
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match="needs torchvision, which is not installed: install it, or remove the images"):
        load_processor(str(tmp_path), False, {})


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_a_family_that_needs_torchvision_is_told(name, tmp_path):
    family = FAMILIES[name]
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": family.processor}))
    kind = {"image_processor_type": family.images.split(".")[1], "processor_class": family.processor}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind))
    with pytest.raises(UserError, match="needs torchvision, which is not installed"):
        load_processor(str(tmp_path), False, {})


def test_the_texts_of_a_batch_are_tokenized_once():
    processor = build_processor("idefics")
    token, calls = processor.image_token, []
    encode = type(processor.tokenizer).__call__

    class Counted(type(processor.tokenizer)):
        def __call__(self, *args, **options):
            calls.append(options)
            return encode(self, *args, **options)

    processor.tokenizer.__class__ = Counted
    images = [[draw(40, 40)], [draw(90, 30)] * 2]
    texts = [token * len(own) for own in images]
    whole = process_images(processor, texts, images)[0]
    calls.clear()
    tokens = {name: whole[name] for name in ("input_ids", "attention_mask")}
    made, written = process_images(processor, texts, images, tokens)
    lengths = whole["attention_mask"].sum(-1).tolist()
    assert [len(ids) for ids in written.ids] == lengths and len(calls) == 1
    assert all(torch.equal(made[name], value) for name, value in whole.items())


def test_what_depends_on_tokens_is_made_of_those_that_are_given():
    processor = build_processor("qwen")
    image, token = draw(40, 40), processor.image_token
    made, written = process_images(processor, [token], [[image]])
    ids = torch.cat([torch.tensor([[1, 2]]), made["input_ids"], torch.tensor([[3]])], 1)
    own, again = process_images(processor, [token], [[image]], {"input_ids": ids})
    assert again.plain_texts == written.plain_texts and written.plain_texts[0].startswith(token)
    assert torch.equal(own["input_ids"], ids) and torch.equal(own["pixel_values"], made["pixel_values"])
    assert own["mm_token_type_ids"].shape == ids.shape and own["mm_token_type_ids"][0, [0, 1, -1]].sum() == 0
