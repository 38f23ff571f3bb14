# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts become what TRL and the rewards take."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from llm_trainer.common.errors import UserError
from llm_trainer.training.generation.prompts import check_prompts, collate_prompts, list_columns

CONTENTS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "level": [None, {"c": 0.5}]}]
ROWS = [{"input_ids": [1], "content": json.dumps(content)} for content in CONTENTS]


def test_all_rows_of_a_batch_have_all_columns_with_their_types():
    assert collate_prompts(ROWS) == [
        {"prompt": "a", "answer": 1, "level": None, "input_ids": [1]},
        {"prompt": "b", "answer": None, "level": [None, {"c": 0.5}], "input_ids": [1]},
    ]


def test_columns_are_those_beside_the_prompt():
    assert list_columns(Dataset.from_list(ROWS)) == ["answer", "level"]


def test_too_few_prompts_are_told():
    arguments = SimpleNamespace(generation_batch_size=32, num_generations=4)
    check_prompts(8, arguments)
    with pytest.raises(UserError, match="has 7 prompts, and completions of 8 are written at once"):
        check_prompts(7, arguments)
