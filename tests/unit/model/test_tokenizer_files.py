# SPDX-License-Identifier: Apache-2.0
"""A result's tokenizer is the base's, byte for byte where nothing changed, in words that Transformers 4 takes too.

tests/compatibility has Transformers 4 itself read them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.tokenizer_files import CONFIG, list_tokenizer_files, make_readable, save_tokenizer
from support.tiny_model import build_tokenizer

NEW_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def read(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*") if file.is_file()
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Files as Transformers 4 stores them, weights beside them."""
    folder = tmp_path / "base"
    build_tokenizer().save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in ("backend", "is_local")}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_start|>"],
        "add_bos_token": False,
        "a_field_of_the_makers": "kept",
    }
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|im_end|>"}), encoding="utf-8")
    (folder / "merges.txt").write_text("", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools", encoding="utf-8")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def test_each_file_of_a_tokenizer_is_listed_once_and_its_code_where_it_has_some(base):
    for name in ("tokenizer.model", "spiece.model", "vocab.json", "tokenization_own.py", "model.safetensors"):
        (base / name).touch()
    (base / "tokenizer").mkdir()
    listed = [path.name for path in list_tokenizer_files(base)]
    named = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "chat_template.jinja"}
    assert set(listed) == {*named, CONFIG, "special_tokens_map.json", "additional_chat_templates"}
    assert len(listed) == len(set(listed))
    config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    (base / CONFIG).write_text(json.dumps(config | {"auto_map": {}}), encoding="utf-8")
    assert {path.name for path in list_tokenizer_files(base)} - set(listed) == {"tokenization_own.py"}


def test_without_a_change_every_byte_is_the_bases(base, output):
    (base / "model.safetensors").touch()
    save_tokenizer(AutoTokenizer.from_pretrained(base), base, output, ModelSettings())
    (base / "model.safetensors").unlink()
    assert read(output) == read(base)


def test_options_of_an_image_processor_stand_in_both_files(base, output):
    (base / "preprocessor_config.json").write_text(json.dumps({"size": 9, "do_resize": True}))
    (base / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 9, "patch_size": 14}}))
    settings = ModelSettings(image_processor_options={"size": {"longest_edge": 784}})
    save_tokenizer(AutoTokenizer.from_pretrained(base), base, output, settings)
    own, whole = (json.loads((output / f"{name}_config.json").read_text()) for name in ("preprocessor", "processor"))
    assert own == {"size": {"longest_edge": 784}, "do_resize": True}
    assert whole == {"image_processor": {"size": {"longest_edge": 784}, "patch_size": 14}}


def test_a_pad_token_and_a_template_are_the_only_change(base, output):
    shutil.rmtree(base / "additional_chat_templates")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", NEW_TEMPLATE
    save_tokenizer(tokenizer, base, output, ModelSettings())
    before, after = read(base), read(output)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {CONFIG, "special_tokens_map.json", "chat_template.jinja"}
    config = json.loads(after[CONFIG])
    assert config == {**json.loads(before[CONFIG]), "pad_token": "<|endoftext|>", "chat_template": NEW_TEMPLATE}
    assert json.loads(after["special_tokens_map.json"]) == {"pad_token": "<|endoftext|>"}
    assert after["chat_template.jinja"] == NEW_TEMPLATE
    read_again = AutoTokenizer.from_pretrained(output)
    assert (read_again.pad_token, read_again.chat_template) == ("<|endoftext|>", NEW_TEMPLATE)


def test_a_template_of_the_job_leaves_no_other_one(base, output):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert isinstance(tokenizer.chat_template, dict)
    tokenizer.chat_template = NEW_TEMPLATE
    save_tokenizer(tokenizer, base, output, ModelSettings())
    assert not (output / "additional_chat_templates").exists()
    assert AutoTokenizer.from_pretrained(output).chat_template == NEW_TEMPLATE


def test_templates_with_names_are_all_written(base, output):
    tokenizer = AutoTokenizer.from_pretrained(base)
    named = {"default": NEW_TEMPLATE, "tool_use": "new tools", "rag": "found"}
    tokenizer.chat_template = named
    save_tokenizer(tokenizer, base, output, ModelSettings())
    assert AutoTokenizer.from_pretrained(output).chat_template == named
    config = json.loads((output / CONFIG).read_text(encoding="utf-8"))  # where Transformers 4 once looked
    assert {each["name"]: each["template"] for each in config["chat_template"]} == named
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    save_tokenizer(tokenizer, base, output, ModelSettings())
    assert AutoTokenizer.from_pretrained(output).chat_template == named


def test_new_words_in_the_vocabulary_are_written_for_both_versions(base, output):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    save_tokenizer(tokenizer, base, output, ModelSettings())
    config = json.loads((output / CONFIG).read_text(encoding="utf-8"))
    assert "extra_special_tokens" not in config
    assert "<|new|>" in config["additional_special_tokens"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(output)("<|new|>")["input_ids"] == [len(tokenizer) - 1]


def test_what_transformers_5_alone_reads_is_said_in_the_older_words(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    stored: dict[str, Any] = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (stored["tokenizer_class"], stored["extra_special_tokens"]) == ("TokenizersBackend", ["<|im_start|>"])
    make_readable(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (config["tokenizer_class"], config["additional_special_tokens"]) == (
        "PreTrainedTokenizerFast",
        ["<|im_start|>"],
    )
    assert not {"extra_special_tokens", "backend"} & config.keys()
    assert AutoTokenizer.from_pretrained(tmp_path).extra_special_tokens == ["<|im_start|>"]


def test_a_base_that_is_gone_costs_no_tokenizer(tmp_path, output):
    save_tokenizer(build_tokenizer(), tmp_path / "gone", output, ModelSettings())
    assert AutoTokenizer.from_pretrained(output).eos_token == "<|im_end|>"


@pytest.mark.parametrize("has_new_token", [False, True])
def test_the_files_of_a_processor_come_with_the_tokenizer(base, output, has_new_token):
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if has_new_token:
        tokenizer.add_tokens(["<new>"])
    save_tokenizer(tokenizer, base, output, ModelSettings())
    assert (output / "preprocessor_config.json").read_text(encoding="utf-8") == "{}"
    assert not (output / "processor_config.json").exists()
