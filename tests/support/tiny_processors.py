# SPDX-License-Identifier: Apache-2.0
"""Processors of images with a byte-level tokenizer, built without a hub: one as Idefics3's and one as Qwen2-VL's."""

from pathlib import Path

import numpy as np
import trl
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from llm_trainer.data.images.processors import without_videos
from support.image_families import build_video_processor
from support.tiny_model import build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # those of the families, as TRL has them, and with marks
NAMES = {"idefics": "idefics3", "qwen": "qwen2_5_vl"}
KINDS = tuple(NAMES)
TURN_ENDS = {"idefics": "<end_of_utterance>", "qwen": "<|im_end|>"}
SIZES = {
    "idefics": {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    "qwen": {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}},
}
OPTIONS = {"idefics": {"image_seq_len": 4}, "qwen": {}}
QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def read_template(kind, suffix=""):
    return (TEMPLATES / f"{NAMES[kind]}{suffix}.jinja").read_text()


def build_processor(kind, sizes=None, options=None):
    sizes, others = sizes or SIZES[kind], {**OPTIONS[kind], **(options or {})}
    tokenizer = build_tokenizer()
    tokenizer.chat_template = read_template(kind)
    if kind == "idefics":
        tokenizer.eos_token = "<|endoftext|>"
        processor = Idefics3Processor(Idefics3ImageProcessorPil(**sizes), tokenizer, **others)
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS})
        with without_videos():
            images, videos = Qwen2VLImageProcessorPil(**sizes), build_video_processor("qwen2_vl")
            processor = Qwen2VLProcessor(images, tokenizer, video_processor=videos)
    processor.chat_template = tokenizer.chat_template
    return processor


def save_processor(kind, folder, sizes=None, options=None):
    """The processor, and its files in the folder as a model's lie there."""
    processor = build_processor(kind, sizes, options)
    with without_videos():
        processor.save_pretrained(folder)
    return processor


def draw(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values, "RGB")
