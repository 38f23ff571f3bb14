# SPDX-License-Identifier: Apache-2.0
"""Builds a small model that sees, of SmolVLM's architecture (Idefics3) with random weights, and its processor."""

import argparse
from pathlib import Path

import torch
from make_pictures import ANSWERS, QUESTION, SIDE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, Idefics3Config, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

PATCH = 16  # pixels a side; each patch becomes a token
SEED = 0
# As SmolVLM's. A message's content is a list of parts where it has images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
LAYERS = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
# The weights of so narrow layers have to differ more than by Transformers' 0.02, or the model learns nothing for long.
SPREAD = {"initializer_range": 0.08}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the words of the demo's own questions and answers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=[*SPECIAL_TOKENS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["User:", "Assistant:", QUESTION, *ANSWERS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end_of_utterance>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor() -> Idefics3Processor:
    """The tokenizer with a processor that makes one piece of an image, and a token of each patch."""
    sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    images = Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    tokenizer = build_tokenizer()
    return Idefics3Processor(
        images, tokenizer, image_seq_len=(SIDE // PATCH) ** 2, chat_template=tokenizer.chat_template
    )


def build_config(processor: Idefics3Processor) -> Idefics3Config:
    tokenizer = processor.tokenizer
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {**LAYERS, **SPREAD, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}
    text = LlamaConfig(
        **LAYERS, **SPREAD, **tokens, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=256
    )
    return Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=processor.image_token_id, scale_factor=1, **SPREAD
    )


def write_model(folder: Path) -> None:
    """Write model and processor to the folder, as a Hub model lies on disk."""
    processor = build_processor()
    torch.manual_seed(SEED)
    AutoModelForImageTextToText.from_config(build_config(processor)).save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the model")
    write_model(parser.parse_args().output)


if __name__ == "__main__":
    main()
