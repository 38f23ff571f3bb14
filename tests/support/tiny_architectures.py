# SPDX-License-Identifier: Apache-2.0
"""Tiny configs of every causal language model that Transformers knows, made by shrinking each class's own defaults."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320
# Sizes by the names that configs have for them. A name that a config lacks is left out.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def list_model_types() -> list[str]:
    """Return the type of every causal language model of the pinned Transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build_tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config of this type whose model takes little memory. Raise what its class raises for such sizes."""
    config_class = CONFIG_MAPPING[model_type]
    values = shrink(config_class())
    return config_class(**{**values, **OVERRIDES.get(model_type, {})})


def shrink(config: PreTrainedConfig, sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """Return small values for the sizes that a config has, and for those of its parts."""
    whole = config.to_dict()
    names = {*whole, *config.attribute_map}
    values: dict[str, Any] = {
        name: size for name, size in sizes.items() if name in names and not isinstance(whole.get(name), (list, dict))
    }
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = {"model_type": part.model_type, **shrink(part, sizes), **OVERRIDES.get(part.model_type, {})}
    return values


# Attention through a latent vector, which has a key for each head (DeepSeek V2 and those after it).
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "head_dim": 8,
}
GROUPS = dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1)  # of experts; one layer has none
INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
# What a class needs beside small sizes, so that its parts fit together.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {**LATENT, **GROUPS},
    "axk2": {**LATENT, **GROUPS},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {**LATENT, **GROUPS},
    "deepseek_v3": {**LATENT, **GROUPS},
    "deepseek_v32": {**LATENT, **GROUPS, **INDEXER, **SPARSE, "layer_types": ["indexed_attention"] * 2},
    "deepseek_v4": {
        **INDEXER,
        **dict.fromkeys(("q_lora_rank", "o_lora_rank"), 32),
        "num_key_value_heads": 1,
        "o_groups": 2,
        "qk_rope_head_dim": 8,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {"1": {"head_dim": 32}},
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe_lite": {**LATENT, **GROUPS, **SPARSE},
    "glm_moe_dsa": {
        **LATENT,
        **GROUPS,
        **INDEXER,
        **SPARSE,
        "layer_types": ["indexed_attention"] * 2,
        "indexer_types": ["full", "shared"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "minicpm3": LATENT,
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # hybrid layers share their weights
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 8,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
