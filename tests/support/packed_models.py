# SPDX-License-Identifier: Apache-2.0
"""Tiny models that keep packed rows apart, or do not, and rows and collators for them."""

import copy

import torch
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from llm_trainer.model.kinds.auto_class import choose_auto_class
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.training.packing import PackingCollator

BASE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
KEEP_APART = {
    "llama": LlamaConfig(**BASE),
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "qwen3-moe": Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=16, decoder_sparse_step=1),
    "mistral": MistralConfig(**BASE, sliding_window=4),
    "gemma3": Gemma3TextConfig(**BASE, **SLIDING, head_dim=16),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
LEAK = {
    "mamba": MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8),
    "lfm2": Lfm2Config(**BASE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "jamba": JambaConfig(**BASE, num_experts=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1),
    "qwen3-next": Qwen3NextConfig(
        **{**BASE, **EXPERTS},
        head_dim=16,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bloom": BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    # Transformers 5.23 builds its mask without the position ids.
    "gpt-oss": GptOssConfig(**BASE, **SLIDING, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
}
LENGTHS = [40, 9, 21, 1, 13, 30]


def build_model(config, attention="eager"):
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # else all models of a config get the kernel of the last one
    return choose_auto_class(config, is_reward_model(config)).from_config(config, attn_implementation=attention).eval()


def make_rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def as_one(rows):
    """The rows as `trl.pack_dataset` packs them into one sequence."""
    joined = {key: [token for row in rows for token in row[key]] for key in ("input_ids", "labels")}
    return {**joined, "seq_lengths": [len(row["input_ids"]) for row in rows]}


def stack(**options):
    return PackingCollator(**{"pad_token_id": 0, "max_length": 64, "flattens": False, **options})
