# SPDX-License-Identifier: Apache-2.0
"""Each parameter has the role that decides whether bitsandbytes quantizes it."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from llm_trainer.model.parameter_roles import assign_roles, has_experts, measure_linear_share
from support.tiny_architectures import build_tiny_config

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def build(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_linear_layers_are_told_from_embeddings_output_and_norms():
    roles = dict(assign_roles(build(LlamaConfig(**SIZES, tie_word_embeddings=False))))
    assert roles["model.embed_tokens.weight"] == "embeddings"
    assert roles["lm_head.weight"] == "output"
    assert roles["model.layers.1.mlp.down_proj.weight"] == "linear"
    assert Counter(roles.values()) == {"linear": 2 * 7, "embeddings": 1, "output": 1, "other": 2 * 2 + 1}


def test_a_tied_output_comes_once():
    roles = dict(assign_roles(build(LlamaConfig(**SIZES, tie_word_embeddings=True))))
    assert [role for role in roles.values() if role in ("embeddings", "output")] == ["embeddings"]


def test_fused_experts_are_not_quantized():
    roles = Counter(role for _, role in assign_roles(build(MixtralConfig(**SIZES, num_local_experts=2))))
    assert roles["experts"] == 2 * 2
    assert roles["linear"] == 2 * 4


def test_convolutions_of_a_recurrent_layer_are_no_experts():
    """Qwen3.5 has such layers beside a dense MLP, which keeps Liger's SwiGLU."""
    model = build(build_tiny_config("qwen3_5_text"))
    convolutions = {role for name, role in assign_roles(model) if "conv1d" in name}
    assert convolutions == {"other"}
    assert not has_experts(model)
    assert has_experts(build(MixtralConfig(**SIZES, num_local_experts=2)))


def test_the_linear_share_is_that_of_the_numbers():
    share = measure_linear_share(build(LlamaConfig(**SIZES, tie_word_embeddings=False)))
    linear = 2 * (4 * 16 * 16 + 3 * 16 * 32)
    assert share == pytest.approx(linear / (linear + 2 * 100 * 16 + 5 * 16))
