# SPDX-License-Identifier: Apache-2.0
"""Tiny configs of every causal language model that Transformers knows, made by shrinking each class's own defaults."""

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


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return small values for the sizes that a config has, and for those of its parts."""
    whole = config.to_dict()
    names = {*whole, *config.attribute_map}
    values: dict[str, Any] = {
        name: size for name, size in SIZES.items() if name in names and not isinstance(whole.get(name), (list, dict))
    }
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = {"model_type": part.model_type, **shrink(part), **OVERRIDES.get(part.model_type, {})}
    return values


OVERRIDES: dict[str, dict[str, Any]] = {}
