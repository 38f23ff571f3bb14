# SPDX-License-Identifier: Apache-2.0
"""The class that builds a model follows its type, and the class that its checkpoint names."""

import pytest
from transformers import AutoConfig

from llm_trainer.model.kinds.auto_class import choose_auto_class, is_trainable, sees_images
from support.tiny_image_models import build_tiny_config

WHOLE, LANGUAGE = "AutoModelForImageTextToText", "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("model_type", "architectures", "expected"),
    [
        pytest.param("qwen3_vl", None, WHOLE, id="no language model of this type"),
        pytest.param("qwen3_5", None, WHOLE, id="both, and nothing said"),
        pytest.param("qwen3_5", ["Qwen3_5ForConditionalGeneration"], WHOLE, id="both, and the whole said"),
        pytest.param("qwen3_5", ["Qwen3_5ForCausalLM"], LANGUAGE, id="both, and the language model said"),
        pytest.param("gemma3", ["Gemma3ForConditionalGeneration"], WHOLE, id="one class for both"),
    ],
)
def test_a_whole_model_is_loaded_unless_its_checkpoint_is_of_the_language_model(model_type, architectures, expected):
    config = build_tiny_config(model_type)
    config.architectures = architectures
    assert choose_auto_class(config).__name__ == expected
    assert choose_auto_class(config, is_reward=True).__name__ == "AutoModelForSequenceClassification"
    assert is_trainable(config)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({WHOLE: "modeling.Own"}, (True, True)),
        ({LANGUAGE: "modeling.Own"}, (False, True)),
        ({WHOLE: "modeling.Own", LANGUAGE: "modeling.Own"}, (False, True)),
        ({}, (False, False)),
    ],
)
def test_code_that_comes_with_a_model_says_itself_what_it_is(own, expected):
    config = AutoConfig.for_model("vit")  # a type that is neither
    config.auto_map = own
    assert (sees_images(config), is_trainable(config)) == expected
