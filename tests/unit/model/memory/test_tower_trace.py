# SPDX-License-Identifier: Apache-2.0
"""A traced tower takes what a real one takes on images, and nothing for a backward pass while it is frozen."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from llm_trainer.config.schema import Settings
from llm_trainer.data.images.processors import process_images
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.memory.shape import UnknownShapeError, read_shape
from llm_trainer.model.memory.step_trace import HeldBytes, Span, Step
from llm_trainer.model.memory.tower_trace import look, trace_tower
from support.image_families import FAMILIES, build_family_config, build_family_processor, build_named_tokenizer
from support.tiny_processors import KINDS, build_processor
from support.tiny_vision_models import build_config

NOTHING = Span(0, 0)
PAGE = Path(__file__).parents[4] / "docs/vision.md"
TWO_PATCHES = {"pixel_values": torch.empty(1, 3, 32, 64), "image_sizes": torch.tensor([[32, 64]])}
# What processors that need torchvision make of an image.
MADE = {
    "llama4": {"pixel_values": torch.empty(2, 3, 32, 32)},
    "mistral3": TWO_PATCHES,
    "pixtral": TWO_PATCHES,
}
STEP = Step(2, 64, False, True, torch.float32, False, False, sharded=False, on_gpu=False)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def processor(kind):
    return build_processor(kind)


@pytest.fixture
def images(processor):
    return RowImages.of({**process(processor), "input_ids": torch.zeros(1, 1)})


def process(processor):
    white = Image.new("RGB", (100, 60), "white")
    return process_images(processor, [processor.image_token], [[white]])[0]


def read(kind, processor, **options):
    return read_config(build_config(kind, processor), **options)


def read_config(config, **options):
    settings = Settings(**options)
    return read_shape(config, settings.model, settings.adapter, torch.float32)


def run_really(kind, processor, images, rows):
    """The forward pass of the tower on pixels with numbers, counted in the same way."""
    config = build_config(kind, processor)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    inputs = {name: torch.rand(value.shape) if value.is_meta else value for name, value in images.repeat(rows).items()}
    held = HeldBytes([*model.parameters(), *model.buffers(), *inputs.values()], "forward")
    with held:
        features = look(model, inputs)
        held.begin("over")
    assert all(each.requires_grad for each in features)
    return held.spans["forward"]


def test_a_tower_takes_what_a_real_one_takes(kind, processor, images):
    trained = read(kind, processor, use_peft=False, train_vision=True)
    for rows in (1, 3):
        traced = trace_tower(trained, replace(STEP, num_sequences=rows, images=images), accumulates=False)
        real = run_really(kind, processor, images, rows)
        assert traced.forward.peak == pytest.approx(real.peak, rel=0.05)
        assert traced.forward.net == pytest.approx(real.net, rel=0.05)
        assert traced.flops > 0


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_frozen_tower_keeps_nothing_for_a_backward_pass(kind, processor, images, recomputes):
    step = replace(STEP, recompute_activations=recomputes, images=images)
    frozen = trace_tower(read(kind, processor), step, accumulates=False)
    assert frozen.backward == NOTHING
    trained = trace_tower(read(kind, processor, train_vision=True), step, accumulates=False)
    assert trained.backward.launches > 0
    assert trained.forward.net > frozen.forward.net


def test_recomputed_blocks_keep_less(kind, processor, images):
    shape = read(kind, processor, train_vision=True)
    kept, recomputed = (
        trace_tower(shape, replace(STEP, recompute_activations=recomputes, images=images), accumulates=False)
        for recomputes in (False, True)
    )
    assert recomputed.forward.net < kept.forward.net


def test_gradients_that_are_added_up_do_not_pile_up_beside(kind, processor, images):
    shape, step = read(kind, processor, use_peft=False, train_vision=True), replace(STEP, images=images)
    alone, added = (trace_tower(shape, step, accumulates) for accumulates in (False, True))
    trained = sum(part.trained_bytes for part in shape.parts if part.role == "tower")
    assert alone.backward.net - added.backward.net == pytest.approx(trained, rel=0.01)


def test_a_step_without_images_has_no_tower(kind, processor):
    assert trace_tower(read(kind, processor), STEP, accumulates=False) is None


def test_a_tower_that_asks_for_numbers_is_not_known(kind, processor, images, monkeypatch):
    shape = read(kind, processor)
    base = shape.skeleton.get_base_model()

    def ask(self, pixel_values, **others):
        return pixel_values[: int(pixel_values.sum())]

    monkeypatch.setattr(type(base), "get_image_features", ask)
    with pytest.raises(UnknownShapeError, match="its tower does not run without numbers"):
        trace_tower(shape, replace(STEP, images=images), accumulates=False)


@pytest.fixture(scope="module")
def unknown_families():
    """The families whose page says that their memory is not known."""
    return re.findall(r"^\| `(\w+)` \|.*memory is not known \|$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_whose_tower_is_not_followed(name, unknown_families):
    """Adapters of each family's tower get gradients, whatever is behind them."""
    made = MADE.get(name) or process(build_family_processor(name))
    step = replace(STEP, images=RowImages.of({**made, "input_ids": torch.zeros(1, 1)}))
    shape = read_config(build_family_config(name, build_named_tokenizer(FAMILIES[name])), train_vision=True)
    if name in unknown_families:
        with pytest.raises(UnknownShapeError, match="does not tell what its tower makes of images"):
            trace_tower(shape, step, accumulates=False)
    else:
        traced = trace_tower(shape, step, accumulates=False)
        assert traced.flops > 0 and traced.backward_flops > 0
