# SPDX-License-Identifier: Apache-2.0
"""Vocabularies are compared word by word, special ones among them."""

import json
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer

from llm_trainer.common.errors import UserError
from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.teacher.vocabulary import check_vocabulary, find_difference


@pytest.mark.parametrize(
    ("teacher", "difference"),
    [
        ({"a": 0, "b": 1}, None),
        ({"a": 1, "b": 0}, "'a' is token 1 there and token 0 here"),
        ({"a": 0}, "'b' is no token there and token 1 here"),
        ({"a": 0, "b": 1, "<|end|>": 2}, "'<|end|>' is token 2 there and no token here"),
    ],
)
def test_the_first_difference_is_told(teacher, difference):
    assert find_difference(teacher, {"a": 0, "b": 1}) == difference


def test_a_teacher_is_compared_before_anything_is_loaded(tiny_model, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model, folder)
    config, words = AutoConfig.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model).get_vocab()
    settings = ModelSettings(model_id="org/teacher")
    check_vocabulary(settings, str(folder), config, config, words)
    larger = AutoConfig.from_pretrained(tiny_model, vocab_size=config.vocab_size + 1)
    with pytest.raises(UserError, match=f"tells {config.vocab_size + 1} tokens apart and the student"):
        check_vocabulary(settings, str(folder), larger, config, words)
    with pytest.raises(UserError, match="'org/teacher' has another vocabulary than the student \\('new' is"):
        check_vocabulary(settings, str(folder), config, config, {**words, "new": len(words)})
    (folder / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="The tokenizer of "):
        check_vocabulary(settings, str(folder), config, config, words)
    check_vocabulary(settings, str(folder), config, config, None)
