# SPDX-License-Identifier: Apache-2.0
"""Image-text models of random weights that fit the tiny processors, built from configs."""

import torch
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlamaConfig,
    Qwen2VLConfig,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def build_config(kind, processor):
    tokenizer = processor.tokenizer
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    if kind == "idefics":  # of 32 pixels a side, patches of 8 and a scale of 2 make the 4 tokens of a piece
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision |= {"image_size": 32, "patch_size": 8}
        text = LlamaConfig(**TEXT, **tokens)
        image_token, pad = processor.image_token_id, tokenizer.pad_token_id
        return Idefics3Config(
            vision_config=vision, text_config=text, image_token_id=image_token, scale_factor=2, pad_token_id=pad
        )
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    text = {
        **TEXT,
        **tokens,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


def build_vision_model(kind, processor):
    torch.manual_seed(0)
    config = build_config(kind, processor)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
