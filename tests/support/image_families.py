# SPDX-License-Identifier: Apache-2.0
"""Families of models that see images: the processor of each with a byte-level tokenizer, and a tiny model that fits it.

Nothing comes from a hub. An image becomes a few pieces of 32 pixels a side.
"""

import importlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from llm_trainer.data.images.processors import has_torchvision, without_videos
from support.tiny_image_models import build_tiny_config, combine
from support.tiny_model import build_tokenizer

SIDE, PATCH = 32, 8
SQUARE = {"height": SIDE, "width": SIDE}
TEMPLATE = (
    "{% macro say(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ say(message['content']) }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ say(message['content']) }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family of models: what its processor is made of, and what its config needs to fit that."""

    processor: str  # its class
    images: str  # module and class of the image processor, without its backend
    tokens: tuple[str, ...]  # that the tokenizer has for images
    sizes: dict[str, Any] = field(default_factory=dict)  # options of the image processor
    options: dict[str, Any] = field(default_factory=dict)  # of the processor
    names: dict[str, str] = field(default_factory=dict)  # of tokens, by which the tokenizer has them as attributes
    ids: dict[str, str] = field(default_factory=dict)  # of the config: the token of each
    config: dict[str, Any] = field(default_factory=dict)
    placeholder: str = ""  # what a chat template writes for an image; empty: the first token
    model_type: str = ""  # where it is not the family's name
    needs_torchvision: bool = False


QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
QWEN: dict[str, Any] = {
    "tokens": QWEN_TOKENS,
    "sizes": {"size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 64}, "patch_size": PATCH},
    "ids": dict(zip(QWEN_IDS, QWEN_TOKENS, strict=True)),
    "placeholder": "<|vision_start|><|image_pad|><|vision_end|>",
}
IDEFICS: dict[str, Any] = {
    "tokens": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "sizes": {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": SIDE}},
    "options": {"image_seq_len": 4},
    "ids": {"image_token_id": "<image>"},
}
PIXTRAL: dict[str, Any] = {
    "tokens": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    "options": {"patch_size": PATCH},
    "ids": {"image_token_index": "[IMG]"},
    "needs_torchvision": True,
}
LLAVA: dict[str, Any] = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
LLAVA |= {"num_additional_image_tokens": 1}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
LLAVA_SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
FAMILIES = {
    "qwen2_vl": Family("Qwen2VLProcessor", "qwen2_vl.Qwen2VLImageProcessor", **QWEN),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", "qwen2_vl.Qwen2VLImageProcessor", **QWEN),
    "qwen3_vl": Family(
        "Qwen3VLProcessor",
        "qwen2_vl.Qwen2VLImageProcessor",
        **QWEN,
        config={"vision_config": {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}},
    ),
    "idefics2": Family(
        "Idefics2Processor",
        "idefics2.Idefics2ImageProcessor",
        ("<image>", "<fake_token_around_image>", "<end_of_utterance>"),
        {"size": {"shortest_edge": 16, "longest_edge": SIDE}},
        {"image_seq_len": 4},
        ids={"image_token_id": "<image>"},
        config={"perceiver_config": {"resampler_n_latents": 4, "resampler_head_dim": 16}},
    ),
    "idefics3": Family("Idefics3Processor", "idefics3.Idefics3ImageProcessor", **IDEFICS),
    "smolvlm": Family("SmolVLMProcessor", "smolvlm.SmolVLMImageProcessor", **IDEFICS),
    "llava": Family(
        "LlavaProcessor",
        "llava.LlavaImageProcessor",
        ("<image>",),
        LLAVA_SIZES,
        LLAVA,
        ids={"image_token_index": "<image>"},
    ),
    "llava_next": Family(
        "LlavaNextProcessor",
        "llava_next.LlavaNextImageProcessor",
        ("<image>",),
        {**LLAVA_SIZES, "image_grid_pinpoints": GRID},
        LLAVA,
        ids={"image_token_index": "<image>"},
        config={"image_grid_pinpoints": GRID},
    ),
    "llava_onevision": Family(
        "LlavaOnevisionProcessor",
        "llava_onevision.LlavaOnevisionImageProcessor",
        ("<image>", "<video>"),
        {"size": SQUARE, "image_grid_pinpoints": GRID},
        {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"},
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        config={"image_grid_pinpoints": GRID},
    ),
    "pixtral": Family(
        "PixtralProcessor",
        "pixtral.PixtralImageProcessor",
        **PIXTRAL,
        sizes={"size": {"longest_edge": 2 * SIDE}, "patch_size": {"height": PATCH, "width": PATCH}},
        model_type="llava",
        config={
            "vision_config": {"model_type": "pixtral", "image_size": 2 * SIDE, "head_dim": 16},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "mistral3": Family(
        "PixtralProcessor",
        "pixtral.PixtralImageProcessor",
        **{**PIXTRAL, "options": {"patch_size": PATCH, "spatial_merge_size": 2}},
        sizes={"size": {"longest_edge": 2 * SIDE}, "patch_size": {"height": PATCH, "width": PATCH}},
        config={"vision_config": {"image_size": 2 * SIDE}},
    ),
    "gemma3": Family(
        "Gemma3Processor",
        "gemma3.Gemma3ImageProcessor",
        ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
        {"size": SQUARE},
        {"image_seq_length": 4},
        {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"},
        {
            "boi_token_index": "<start_of_image>",
            "image_token_index": "<image_soft_token>",
            "eoi_token_index": "<end_of_image>",
        },
        {"mm_tokens_per_image": 4},
    ),
    "internvl": Family(
        "InternVLProcessor",
        "got_ocr2.GotOcr2ImageProcessor",
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        {"size": SQUARE, "crop_to_patches": True, "max_patches": 2},
        {"image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_token_id": "<IMG_CONTEXT>"},
        {"vision_config": {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}},
    ),
    "mllama": Family(
        "MllamaProcessor",
        "mllama.MllamaImageProcessor",
        ("<|image|>", "<|python_tag|>"),
        {"size": SQUARE, "max_image_tiles": 2},
        ids={"image_token_index": "<|image|>"},
        config={
            "vision_config": {
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "num_global_layers": 1,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 64 * 3,
            },
            "text_config": {"cross_attention_layers": [1]},
        },
    ),
    "llama4": Family(
        "Llama4Processor",
        "llama4.Llama4ImageProcessor",
        ("<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        {"size": SQUARE, "max_patches": 2},
        {"patch_size": PATCH},
        ids={"image_token_index": "<|patch|>"},
        config={
            "vision_config": {
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "intermediate_size": 256,
            }
        },
        needs_torchvision=True,
    ),
    "glm4v": Family(
        "Glm4vProcessor",
        "glm4v.Glm4vImageProcessor",
        ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
        QWEN["sizes"],
        ids={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
        },
        placeholder="<|begin_of_image|><|image|><|end_of_image|>",
    ),
}


def build_named_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return the tests' tokenizer with the tokens of a family, and its chat template."""
    plain = build_tokenizer()
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    own = {name: getattr(plain, name) for name in names}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, **own, extra_special_tokens=family.names or None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", family.placeholder or family.tokens[0])
    return tokenizer


def build_family_processor(name: str) -> Any:
    """Return a family's processor, with its chat template."""
    family, tokenizer = FAMILIES[name], build_named_tokenizer(FAMILIES[name])
    module, kind = family.images.split(".")
    backend = "" if has_torchvision() else "_pil"
    pixels = importlib.import_module(f"transformers.models.{module}.image_processing{backend}_{module}")
    images = getattr(pixels, kind + ("Pil" if backend else ""))(**family.sizes)
    make = getattr(transformers, family.processor)
    parts = {"image_processor": images, "tokenizer": tokenizer, **family.options}
    if "video_processor" in inspect.signature(make.__init__).parameters:
        parts["video_processor"] = build_video_processor(name)
    with without_videos():
        processor = make(**parts)
        processor.chat_template = tokenizer.chat_template
    return processor


def save_family(name: str, folder: Path) -> None:
    """Write a family's processor to the folder as a model's lies there."""
    with without_videos():
        build_family_processor(name).save_pretrained(folder)


def build_video_processor(name: str) -> Any:
    """Return what processes a family's videos, which no test has; None without torchvision, which it needs."""
    if not has_torchvision():
        return None
    kind = VIDEO_PROCESSOR_MAPPING_NAMES[name]
    return getattr(transformers, kind["torchvision"] if isinstance(kind, dict) else kind)()


def build_family_model(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a tiny model of random weights that fits a family's tokenizer."""
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(build_family_config(name, tokenizer), attn_implementation="eager")


def build_family_config(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the config of a tiny model that fits a family's tokenizer."""
    family = FAMILIES[name]
    config = build_tiny_config(family.model_type or name)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.ids.items()}
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 1024}
    own = combine(combine(config.to_dict(), {"text_config": text}), {**family.config, **ids})
    return type(config)(**own)
