# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's files of a result: the base's own, byte for byte where nothing changed, for Transformers 4 and 5.

The files of a processor, by which a model that sees images is served, come with them.

Transformers 5 writes special tokens and class names in a way that Transformers 4 cannot load, and leaves fields out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_trainer.common import log
from llm_trainer.common.bounded_parsing import read_json
from llm_trainer.common.errors import quote_error
from llm_trainer.common.files import remove_path, write_text
from llm_trainer.config.sections import ModelSettings

CONFIG, NAMED_TOKENS, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
# What prepares images, videos and sounds for a model, and joins it with the tokenizer.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
PATTERNS = (
    *PROCESSOR_FILES,
    *("tokenizer*", "chat_template*", NAMED_TEMPLATES, NAMED_TOKENS, "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
)
OTHER_TEMPLATES = (NAMED_TEMPLATES, "chat_template.json")  # a processor's, and those with names
# Classes of Transformers 5 alone -> the class that stands for them in both.
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
NEW_FIELDS = ("backend", "is_local", "local_files_only")  # of the loading, which Transformers 5 writes down


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path, settings: ModelSettings) -> None:
    """Write the tokenizer of a training to a folder that exists, by the files of its base.

    Where special tokens, the chat template or options of the image processor are others than the base's, they alone
    are changed.
    """
    trust_remote_code = settings.trust_remote_code
    try:
        loaded = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:  # the base's folder is not what it was when the job began
        log.warning(f"The tokenizer of {base} could not be compared with the training's: {quote_error(error)}.")
        loaded = None
    if loaded is not None and loaded.get_vocab() == tokenizer.get_vocab():
        copy_tokenizer(base, folder)
        change_tokens(folder, find_changed_tokens(loaded, tokenizer))
        if loaded.chat_template != tokenizer.chat_template:
            change_template(folder, tokenizer.chat_template)
    else:
        tokenizer.save_pretrained(folder)
        change_template(folder, tokenizer.chat_template)
        for name in PROCESSOR_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
    change_image_options(folder, settings.image_processor_options)
    make_readable(folder, type(loaded or tokenizer).__name__)


def change_image_options(folder: Path, options: dict[str, Any]) -> None:
    """Give the image processor of a folder other options, in its own file and in the whole processor's."""
    own, whole = (folder / name for name in PROCESSOR_FILES[:2])
    if own.is_file():
        change_object(own, options)
    if isinstance(images := read_object(whole).get("image_processor"), dict):
        change_object(whole, {"image_processor": {**images, **options}})


def find_changed_tokens(loaded: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Return the special tokens with names, such as pad_token, that a training gave the tokenizer of its base."""
    before, after = loaded.special_tokens_map, tokenizer.special_tokens_map
    return {name: after.get(name) for name in {**before, **after} if before.get(name) != after.get(name)}


def change_tokens(folder: Path, tokens: dict[str, str | None]) -> None:
    """Give special tokens with names in the files of a tokenizer."""
    change_object(folder / CONFIG, tokens)
    if (folder / NAMED_TOKENS).is_file():
        change_object(folder / NAMED_TOKENS, tokens)


def change_template(folder: Path, template: str | dict[str, str] | None) -> None:
    """Give a tokenizer's files another chat template, or others with names, in both places where servers look."""
    if template is None:
        return
    for name in (*OTHER_TEMPLATES, TEMPLATE):
        remove_path(folder / name)
    named = template if isinstance(template, dict) else {"default": template}
    for name, source in named.items():
        file = folder / TEMPLATE if name == "default" else folder / NAMED_TEMPLATES / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        write_text(file, source)
    listed = [{"name": name, "template": source} for name, source in named.items()]
    change_object(folder / CONFIG, {"chat_template": template if isinstance(template, str) else listed})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, and its code where it has some."""
    for path in list_tokenizer_files(source):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def list_tokenizer_files(folder: Path) -> list[Path]:
    """List the files that a tokenizer may consist of, and the folder of its templates, by name.

    Its code is among them where it has some. Other folders, such as a diffusion model's `tokenizer`, are not read.
    """
    patterns = (*PATTERNS, "*.py") if "auto_map" in read_object(folder / CONFIG) else PATTERNS
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() or path.name == OTHER_TEMPLATES[0])


def make_readable(folder: Path, class_name: str | None = None) -> None:
    """Have Transformers 4 and 5 read the tokenizer of a folder. `class_name` stands in where its files name none.

    A list of special tokens is taken by both only under the older name.
    """
    config = read_object(folder / CONFIG)
    changes: dict[str, Any] = {}
    if isinstance(extra := config.get("extra_special_tokens"), list):
        changes = {"extra_special_tokens": None, "additional_special_tokens": extra or None}
    name = config.get("tokenizer_class") or class_name
    changes["tokenizer_class"] = CLASSES.get(name, name) if name else None
    if name in CLASSES:
        changes |= dict.fromkeys(NEW_FIELDS)
    change_object(folder / CONFIG, changes)


def change_object(file: Path, changes: dict[str, Any]) -> None:
    """Write a JSON object with changed fields; None removes a field. Without a change the file stays as it is."""
    before = read_object(file)
    after = {name: value for name, value in {**before, **changes}.items() if value is not None or name not in changes}
    if after != before:
        write_text(file, json.dumps(after, indent=2, ensure_ascii=False) + "\n")


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file that Transformers has read or written; {} without one.

    Tokenizers without a limit have a model_max_length of 31 digits.
    """
    return read_json(file, is_plain=False) if file.is_file() else {}
