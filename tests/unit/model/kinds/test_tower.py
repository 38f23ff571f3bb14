# SPDX-License-Identifier: Apache-2.0
"""The tower of a model is found by its structure, and frozen as a whole."""

import pytest
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.model.kinds.tower import (
    check_tower,
    describe_tower,
    freeze_tower,
    list_tower,
    name_parts,
    spare_gradients,
)
from llm_trainer.model.layers.reward_head import describe_rewards
from llm_trainer.model.loading import build_on_meta
from support.adapted_models import LLAMA
from support.tiny_image_models import build_tiny_config

PARTS = {
    "qwen3_vl": ["model.visual"],
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "smolvlm": ["model.vision_model", "model.connector"],
    "llava_next": ["model.image_newline", "model.vision_tower", "model.multi_modal_projector"],
    "git": ["git.image_encoder"],  # its projection is of no class that tells what it is for
    "chameleon": ["model.vqmodel"],  # an image tokenizer within the decoder
    "llama4": ["vision_model", "multi_modal_projector"],
}


def build(model_type):
    return build_on_meta(build_tiny_config(model_type), None, trust_remote_code=False)


@pytest.mark.parametrize("model_type", PARTS)
def test_a_tower_is_all_but_the_language_model(model_type):
    model = build(model_type)
    assert name_parts(model) == PARTS[model_type]
    freeze_tower(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - {*list_tower(model)}
    assert all(name.startswith(tuple(PARTS[model_type])) for name in list_tower(model))
    assert not any(name.startswith(tuple(PARTS[model_type])) for name in trained)


def test_the_head_of_rewards_is_no_part_of_the_tower():
    config = build_tiny_config("gemma3")
    describe_rewards(config)
    model = build_on_meta(config, None, trust_remote_code=False)
    assert name_parts(model) == PARTS["gemma3"]
    freeze_tower(model)
    assert model.score.weight.requires_grad


def test_a_model_of_texts_has_no_tower():
    model = build_on_meta(LLAMA, None, trust_remote_code=False)
    assert list_tower(model) == list(describe_tower(model, False)) == []
    check_tower("base", model, train_vision=False)
    with pytest.raises(UserError, match=r"train_vision=true: model_id='base' is a LlamaForCausalLM, which has no part"):
        check_tower("base", model, train_vision=True)


def test_the_log_names_the_parts_and_their_fate():
    model = build("gemma3")
    (frozen,), (trained,) = (describe_tower(model, asked) for asked in (False, True))
    assert frozen.startswith("Vision: model.vision_tower, model.multi_modal_projector (")
    assert frozen.endswith(" weights) are frozen: train_vision=true trains them")
    assert trained.endswith(" weights) are trained")


@pytest.mark.parametrize("is_frozen", [True, False])
def test_no_gradient_goes_through_a_frozen_tower_though_recomputed_layers_ask_for_one(is_frozen):
    model = build("llava_next").train()
    model.enable_input_require_grads()
    if is_frozen:
        freeze_tower(model)
    spare_gradients(model)
    image = torch.empty(1, 3, *[model.config.vision_config.image_size] * 2, device="meta")
    seen = model.get_submodule("model.vision_tower")(image).last_hidden_state
    assert seen.requires_grad != is_frozen
    assert torch.is_grad_enabled()


def test_gradients_go_through_a_frozen_part_to_a_trained_one_before_it():
    """The projector of Gemma 3 has no linear layer, and with that no adapter."""
    config = build_tiny_config("gemma3")
    config.mm_tokens_per_image = 4
    model = build_on_meta(config, None, trust_remote_code=False).train()
    model.get_submodule("model.multi_modal_projector").requires_grad_(False)
    spare_gradients(model)
    image = torch.empty(1, 3, *[config.vision_config.image_size] * 2, device="meta")
    assert model.get_image_features(image).pooler_output.requires_grad


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_tower_stays_as_after_the_training(is_frozen):
    """The image tokenizer of Emu3 has norms over batches."""
    model = build("emu3")
    if is_frozen:
        freeze_tower(model)
    spare_gradients(model)
    model.train()
    in_training = {module.training for module in model.get_submodule("model.vqmodel").modules()}
    assert in_training == {not is_frozen}
    assert all(module.training for module in model.get_decoder().modules())
    assert model.eval() is model and not any(module.training for module in model.modules())


def test_gradients_are_on_again_after_a_frozen_tower_that_failed():
    model = build("llava_next")
    freeze_tower(model)
    spare_gradients(model)
    with pytest.raises(AttributeError):
        model.get_submodule("model.vision_tower")("no image")
    assert torch.is_grad_enabled()
