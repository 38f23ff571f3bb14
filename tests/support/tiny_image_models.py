# SPDX-License-Identifier: Apache-2.0
"""Tiny configs of every image-text model that Transformers knows, made by shrinking each class's own defaults."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from support import tiny_architectures

# Sizes of the parts that see images, by the names that configs have for them.
SIZES: dict[str, int] = {
    **dict.fromkeys(("depth", "num_blocks", "perceiver_depth", "resampler_depth"), 2),
    **dict.fromkeys(("num_heads", "resampler_n_heads"), 4),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "projector_hidden_size", "output_dim"), 64),
    "image_size": 32,
    "patch_size": 8,
    **{
        name: 300 + number
        for number, name in enumerate(
            (
                *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
                *("vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id", "audio_token_id"),
            )
        )
    },
}


def list_image_types() -> list[str]:
    """Return the type of every image-text model of the pinned Transformers."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build_tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config of this type whose model takes little memory. Raise what its class raises for such sizes."""
    config_class = CONFIG_MAPPING[model_type]
    values = tiny_architectures.shrink(config_class(), {**tiny_architectures.SIZES, **SIZES})
    return config_class(**combine(values, OVERRIDES.get(model_type, {})))


def combine(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return values with others in their place, part by part."""
    merged = dict(values)
    for name, value in others.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = combine(merged[name], value) if both else value
    return merged


def turn(sections: list[int], **others: Any) -> dict[str, Any]:
    """Return the rope of a text whose heads turn with time, height and width, by so many of their numbers."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **others}
    return {"text_config": {"rope_parameters": rope}}


LATENT, GROUPS, INDEXER = tiny_architectures.LATENT, tiny_architectures.GROUPS, tiny_architectures.INDEXER
SPARSE = tiny_architectures.SPARSE
KINDS = {"layer_types": ["indexed_attention"] * 2, "indexer_types": ["full", "shared"]}
CODES = {"vocabulary_map": {"<image>": 300, **{f"IMGIMG{letter}Z": 301 + n for n, letter in enumerate("ABCD")}}}
GEMMA_TEXT = {
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 32}},
    "vocab_size_per_layer_input": tiny_architectures.VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
# What a class needs beside small sizes, so that its parts fit together.
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {**CODES, "vq_config": {"base_channels": 32, "resolution": 32}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0}
                for kind in ("full_attention", "sliding_attention")
            }
        }
    },
    "cosmos3_edge": turn([2, 3, 3]),
    "deepseek_ocr2": {"text_config": SPARSE},
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"] * 2,
            "per_layer_config": {"0": {"num_experts_per_tok": 1}},
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        "text_config": {
            **LATENT,
            **GROUPS,
            **INDEXER,
            **SPARSE,
            "layer_types": ["indexed_attention", "sliding_attention"],
            "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 2}},
            "head_dim": 24,
        },
    },
    "emu3": {**CODES, "vq_config": {"base_channels": 32, "codebook_size": 64}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "moe_intermediate_size": [32, 32],
            "rope_parameters": turn([3, 3, 2])["text_config"]["rope_parameters"],
        }
    },
    "gemma4": {
        "text_config": GEMMA_TEXT,
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
        },
    },
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 64,
            "mm_posemb_size": 16,
            "output_proj_dims": 64,
        }
    },
    "glm46v": turn([2, 3, 3]),
    "glm4v": turn([2, 3, 3]),
    "glm4v_moe": turn([2, 1, 1], partial_rotary_factor=0.5),
    "glm5_next": {
        "text_config": {
            **LATENT,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "num_key_value_heads": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            **INDEXER,
            "index_kpool": 2,
            "mlp_layer_types": ["dense", "sparse"],
            **KINDS,
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_types": ["full"] * 2,
            "qk_head_dim": 16,
        }
    },
    "glm_ocr": turn([2, 3, 3]),
    "glmga": turn([2, 3, 3]),
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
        "use_spatial_sampling": False,
        "downsample_rate": "1/2",
    },
    "hunyuan_vl": {**turn([2, 2, 2, 2]), "vision_config": {"text_hidden_size": 64}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 64}},
    "mistral4": {**LATENT, "num_key_value_heads": 4},
    "mistral_large4": {
        "text_config": {
            **LATENT,
            **INDEXER,
            **SPARSE,
            **KINDS,
            "no_rope_layers": [1, 0],
            "kv_source_layers": [0, 1],
            "qk_head_dim": 24,
        }
    },
    "mllama": {"text_config": {"cross_attention_layers": [1]}},  # which texts pass over
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 64},
        "vision_config": {"image_size": [32, 32], "num_position_embeddings": 16},
    },
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [32, 32, 32, 64], "depths": [1, 1, 1, 1]},
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "layer_rope_theta": [500000.0, 0],
            "mlp_layer_types": ["dense", "sparse"],
            "moe_hidden_size": 64,
        },
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "vision_hidden_size": 64},
    "paddleocr_vl": turn([2, 3, 3]),
    "qwen2_5_omni_thinker": {**turn([2, 3, 3]), "vision_start_token_id": 304},
    "qwen2_5_vl": turn([2, 3, 3]),
    "qwen2_vl": turn([2, 3, 3]),
    "step3p7": {"text_config": {"sliding_window": 8}},
}
