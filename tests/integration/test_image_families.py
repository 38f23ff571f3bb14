# SPDX-License-Identifier: Apache-2.0
"""Each family of models gets batches that are what its own processor gives for the same conversations."""

import re
from pathlib import Path

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.data.images.processors import has_torchvision, load_processor
from llm_trainer.readers.images import ImageRules
from support.image_families import FAMILIES, build_family_model, save_family
from support.image_rows import CONVERSATIONS, ROWS, prepare_rows, save_pictures

TEXT_ALONE = {"input_ids", "labels", "attention_mask"}
ANSWERS = ["A cat.<|im_end|>", "Me.<|im_end|>", "Much.<|im_end|>Yes.<|im_end|>"]
AVAILABLE = [name for name, family in FAMILIES.items() if has_torchvision() or not family.needs_torchvision]
PAGE = Path(__file__).parents[2] / "docs/vision.md"


def process(processor, conversations):
    """What a processor makes of conversations, as its own apply_chat_template calls it."""
    parts = [[part for turn in turns for part in turn["content"]] for turns in conversations]
    return processor(
        images=[[part["image"] for part in own if "image" in part] for own in parts],
        text=[processor.tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=False,
    )


@pytest.fixture(params=AVAILABLE)
def prepared(request, tmp_path):
    """A family's vocabulary and tiny model, and the rows with images that were made with these."""
    family = request.param
    save_family(family, tmp_path)
    save_pictures(tmp_path)
    processor = load_processor(str(tmp_path), False, {})
    model = build_family_model(family, processor.tokenizer)
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    images = ImageProcessing(str(tmp_path), token)
    tokenizer = processor.tokenizer
    size = model.config.get_text_config().vocab_size
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), size, images)
    rows, report = prepare_rows(vocabulary, ROWS, tmp_path)
    assert (report.num_rows, report.num_images, report.num_rows_with_images) == (3, 3, 2)
    return vocabulary, model, rows


def test_a_batch_is_what_the_families_processor_gives(prepared):
    vocabulary, model, rows = prepared
    tokenizer, processor = vocabulary.tokenizer, vocabulary.images.processor
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), tokenizer.pad_token_id)
    for places in ([0], [2], [0, 1, 2], [2, 1, 0], [1]):
        batch = collator([rows[place] for place in places])
        trained = [[token for token in own if token != IGNORED] for own in batch["labels"].tolist()]
        assert tokenizer.batch_decode(trained) == [ANSWERS[place] for place in places]
        if places != [1]:
            expected = process(processor, [CONVERSATIONS[place] for place in places])
            assert batch.keys() == {*expected, "labels"}
            for name, value in expected.items():
                assert torch.equal(batch[name], value.float() if value.is_floating_point() else value), name
        else:
            assert batch.keys() == TEXT_ALONE
        with torch.no_grad():
            assert torch.isfinite(model(**batch).loss)


def test_a_batch_of_texts_runs_the_tower_as_one_with_images_does(prepared):
    """Ranks whose batches have images and ranks whose batches have none call the same blocks, each of them once."""
    vocabulary, model, rows = prepared
    collator = ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id, always_sees=True)
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_hook(lambda *call, name=name: calls.append(name))
    called = []
    for places in ([1], [0], [2], [0, 1, 2]):
        batch = collator([rows[place] for place in places])
        batch.pop("num_tokens", None)
        model(**batch, use_cache=False)
        called.append([*calls])
        calls.clear()
    assert len({*called[0]}) == len(called[0]) and all(each == called[0] for each in called), called


def test_no_token_of_a_text_sees_the_white_image(prepared):
    vocabulary, model, rows = prepared
    plain, seeing = (
        ImageCollator(vocabulary.images, ImageRules(10**7), vocabulary.tokenizer.pad_token_id, always_sees=sees)(
            [rows[1]]
        )
        for sees in (False, True)
    )
    assert seeing.pop("num_tokens").tolist() == [len(rows[1]["input_ids"])]
    model.eval()
    with torch.no_grad():
        logits = [model(**batch, use_cache=False).logits for batch in (plain, seeing)]
    torch.testing.assert_close(logits[1][:, : logits[0].shape[1]], logits[0])


def test_the_page_names_each_family():
    table = re.findall(r"^\| `(\w+)` \| `\w+` \|", PAGE.read_text(), re.MULTILINE)
    assert table == sorted(FAMILIES)
