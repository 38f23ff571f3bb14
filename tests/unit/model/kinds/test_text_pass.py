# SPDX-License-Identifier: Apache-2.0
"""What a class demands of a text without images is found by an experiment, and given or told."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llm_trainer.common.errors import UserError
from llm_trainer.model.kinds.text_pass import (
    check_texts,
    expose_backbone,
    find_token_types,
    give_token_types,
    has_exposed_backbone,
)
from llm_trainer.model.layers.reward_head import describe_rewards
from llm_trainer.model.loading import build_on_meta
from support.adapted_models import LLAMA
from support.tiny_image_models import build_tiny_config

ROWS = torch.tensor([[3, 4, 5, 6]])


def build(model_type):
    return build_on_meta(build_tiny_config(model_type), None, trust_remote_code=False)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("blip-2", "takes no text without an image .*pixel_values"),
        ("idefics", "takes no text without an image .*pixel_values"),
        ("t5gemma2", "encodes texts before it answers"),
        ("diffusion_gemma", "does not write token by token"),
    ],
)
def test_what_does_not_continue_texts_is_refused(model_type, reason):
    with pytest.raises(UserError, match=f"model_id='base' is a .*, which {reason}.*: give "):
        check_texts("base", build(model_type))


def test_what_continues_texts_is_taken():
    check_texts("base", build("qwen3_vl"))
    check_texts("base", build_on_meta(LLAMA, None, trust_remote_code=False))


def test_a_reward_model_need_not_write():
    config = build_tiny_config("gemma3")
    describe_rewards(config)
    check_texts("base", build_on_meta(config, None, trust_remote_code=False))


def test_a_class_that_demands_token_types_gets_them_in_a_training_alone():
    name = find_token_types(build("molmo2"))
    assert name == "mm_token_type_ids"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(build_tiny_config("molmo2"))
    give_token_types(model, name)
    given = []
    model.base_model.register_forward_pre_hook(
        lambda _, places, inputs: given.append(inputs.get(name)), with_kwargs=True
    )
    with torch.no_grad():
        model.train()(input_ids=ROWS)
        model.train()(input_ids=ROWS, mm_token_type_ids=torch.zeros_like(ROWS) + 0)
        model.eval()(input_ids=ROWS)
    assert [None if types is None else types.tolist() for types in given] == [[[0] * 4], [[0] * 4], None]


def test_other_classes_are_given_nothing():
    model = build("gemma3")
    assert find_token_types(model) is None
    give_token_types(model, None)
    assert not model.base_model._forward_pre_hooks


def test_a_class_without_a_backbone_gets_that_of_its_language_model():
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(build_tiny_config("llama4")).eval()
    names = [name for name, _ in model.named_parameters()]
    assert model.base_model is model
    expose_backbone(model)
    model = copy.deepcopy(model)
    assert has_exposed_backbone(model)
    assert model.base_model is model.language_model.model
    assert [name for name, _ in model.named_parameters()] == names
    with torch.no_grad():
        states = model.base_model(ROWS, use_cache=False).last_hidden_state
        found, expected = model.get_output_embeddings()(states), model(input_ids=ROWS, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_a_class_with_a_backbone_keeps_it():
    model = build("gemma3")
    assert not has_exposed_backbone(model)
    assert model.base_model is model.model
