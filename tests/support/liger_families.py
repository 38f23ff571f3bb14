# SPDX-License-Identifier: Apache-2.0
"""Configs of the model families whose Liger kernels are tested, in any size."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

FAMILIES: dict[str, tuple[type[PreTrainedConfig], tuple[str, ...]]] = {
    "llama": (LlamaConfig, ()),
    "mistral": (MistralConfig, ("window",)),
    "qwen2": (Qwen2Config, ()),
    "qwen3": (Qwen3Config, ("head",)),
    "gemma2": (Gemma2Config, ("head",)),
    "gemma3": (Gemma3TextConfig, ("head", "window")),
    "phi3": (Phi3Config, ()),
    "olmo2": (Olmo2Config, ()),
    "granite": (GraniteConfig, ()),
    "glm4": (Glm4Config, ("head",)),
    "gpt-oss": (GptOssConfig, ("head", "local experts")),
    "qwen3-moe": (Qwen3MoeConfig, ("head", "experts")),
    "mixtral": (MixtralConfig, ("local experts",)),
}


def build_families(num_experts: int, window: int, **sizes: int) -> dict[str, PreTrainedConfig]:
    """Return a config of each family. `window` is that of sliding attention, in tokens."""
    options: dict[str, dict[str, Any]] = {
        "head": {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]},
        "window": {"sliding_window": window},
        "experts": {
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": sizes["hidden_size"] // 2,
        },
        "local experts": {"num_local_experts": num_experts, "num_experts_per_tok": 2},
    }
    return {
        name: config_class(
            **{**sizes, **dict.fromkeys(("bos_token_id", "eos_token_id"), 1), "pad_token_id": 0},
            **{key: value for own in names for key, value in options[own].items()},
        )
        for name, (config_class, names) in FAMILIES.items()
    }
