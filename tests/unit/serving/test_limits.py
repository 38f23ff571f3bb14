# SPDX-License-Identifier: Apache-2.0
"""Which adapters vLLM cannot load, told by the adapter and by the settings alone."""

import pytest
from peft import LoraConfig

from llm_trainer.config.schema import Settings
from llm_trainer.serving.limits import find_adapter_refusals, find_served_rank, find_settings_refusals


@pytest.mark.parametrize(
    ("lora", "model_type", "part"),
    [
        ({"modules_to_save": ["lm_head"]}, "llama", "it holds whole modules (lm_head)"),
        ({"use_dora": True}, "llama", "it is a DoRA adapter"),
        ({"bias": "all"}, "llama", "it trains biases"),
        ({"rank_pattern": {"k_proj": 4}}, "llama", "differ in rank or alpha"),
        ({"r": 513}, "llama", "its rank is 513 and at most 512"),
        ({"target_modules": ["lm_head"]}, "qwen2", "it sits on lm_head, which vLLM adapts in no qwen2"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "qwen3_moe", "fused experts"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "gpt_oss", "adapts all or none"),
    ],
)
def test_what_vllm_cannot_load_is_refused(lora, model_type, part):
    config = LoraConfig(**{"target_modules": ["q_proj"], **lora})
    (sentence,) = find_adapter_refusals(config, model_type)
    assert part in sentence
    assert "merge_weights=true" in sentence


@pytest.mark.parametrize(
    ("lora", "model_type"),
    [
        ({"use_rslora": True, "r": 512}, "llama"),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "llama"),
        ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, "gpt_oss"),
    ],
)
def test_what_vllm_loads_is_not_refused(lora, model_type):
    assert list(find_adapter_refusals(LoraConfig(**{"target_modules": ["q_proj"], **lora}), model_type)) == []


def test_an_adapter_on_the_vision_tower_is_refused_which_vllm_would_leave_out():
    (sentence,) = find_adapter_refusals(LoraConfig(target_modules=["q_proj"]), "qwen3_vl_text", sees=True)
    assert sentence.startswith("vLLM and LMI cannot load this adapter: it sits on the vision tower")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "use_dora=true: vLLM"),
        ({"train_vision": True}, "train_vision=true: vLLM"),
        ({"lora_r": 600}, "lora_r=600: vLLM"),
        ({"lora_r": 300, "init_lora_weights": "pissa"}, "lora_r=300, exported as 600 with init_lora_weights=pissa"),
        ({"use_dora": True, "merge_weights": True}, None),
        ({"lora_r": 600, "use_peft": False}, None),
        ({"train_vision": True, "merge_weights": True}, None),
        ({}, None),
    ],
)
def test_settings_alone_tell_some_of_it_before_the_training(settings, part):
    chosen = Settings(**settings)
    texts = list(find_settings_refusals(chosen.adapter, chosen.output.merge_weights))
    assert len(texts) == (part is not None)
    assert not part or texts[0].startswith(part)


def test_the_served_rank_is_the_next_that_vllm_takes():
    assert [find_served_rank(rank) for rank in (1, 2, 9, 257, 512, 513)] == [1, 8, 16, 320, 512, None]
