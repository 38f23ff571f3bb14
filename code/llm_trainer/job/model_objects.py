# SPDX-License-Identifier: Apache-2.0
"""The small files of a model that Transformers reads before the weights: whether each can be read at all.

Transformers itself would fail on a broken one in any way that Python knows, and often without the file's name.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_trainer.common.bounded_parsing import MAX_JSON_BYTES, UnreadableTextError, read_json, read_text
from llm_trainer.common.safetensors_files import is_git_lfs_pointer

CONFIG = "config.json"
OBJECTS = (
    *(CONFIG, "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.json"),
)
TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # Transformers reads them all
LAYER_NAMES = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
SIZE_NAMES = ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head")
MAX_LAYERS = 10_000  # the deepest models have some hundreds
MAX_OBJECT_BYTES = 4 * MAX_JSON_BYTES  # the tokenizer.json of 262,000 tokens has 33 MB


def find_broken_objects(folder: Path) -> Iterator[str]:
    """Yield a sentence for each of these files in a folder that is no JSON object, or no text.

    The pointer that Git LFS leaves in a file's place is for the caller to tell of.
    """
    files = [file for name in (*OBJECTS, TEMPLATE) if (file := folder / name).exists()]
    for file in [*files, *sorted(folder.glob(NAMED_TEMPLATES))]:
        try:
            check_object(file)
        except UnreadableTextError as error:
            if not (file.is_file() and os.access(file, os.R_OK) and is_git_lfs_pointer(file)):
                yield f"{file} {error.reason}: download the model again."


def check_object(file: Path) -> None:
    """Raise UnreadableTextError where a file holds no JSON object; no text, where it is a template."""
    if file.suffix == ".jinja":
        read_text(file, str(file), MAX_JSON_BYTES)
        return
    value = read_json(file, max_bytes=MAX_OBJECT_BYTES, is_plain=False)
    if not isinstance(value, dict):
        raise UnreadableTextError(str(file), "holds no JSON object")
    if file.name == CONFIG:
        check_sizes(file, value)


def check_sizes(file: Path, config: dict[str, Any]) -> None:
    """Raise UnreadableTextError for a config of no model: without layers, width or vocabulary, or with endless layers.

    Layers are made one by one. A part for images may stand there unused, and have none.
    """
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in LAYER_NAMES:
            number = part.get(name)
            if isinstance(number, int | float) and number > MAX_LAYERS:
                raise UnreadableTextError(str(file), f"has a {name} of more than {MAX_LAYERS:,}")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in (*LAYER_NAMES, *SIZE_NAMES):
            number = part.get(name)
            if isinstance(number, int | float) and number < 1:
                raise UnreadableTextError(str(file), f"has {name}={number!r}, and a model has at least 1")
