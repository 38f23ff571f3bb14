# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts become what TRL and the rewards take."""

import json

from datasets import Dataset

from llm_trainer.config.schema import Settings
from llm_trainer.training.generation.prompts import collate_prompts, find_prompt_problems, list_columns

CONTENTS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "level": [None, {"c": 0.5}]}]
ROWS = [{"input_ids": [1], "length": 1, "content": json.dumps(content)} for content in CONTENTS]


def test_all_rows_of_a_batch_have_all_columns_with_their_types():
    assert collate_prompts(ROWS) == [
        {"prompt": "a", "answer": 1, "level": None, "input_ids": [1], "fills": False},
        {"prompt": "b", "answer": None, "level": [None, {"c": 0.5}], "input_ids": [1], "fills": False},
    ]


def test_columns_are_those_beside_the_prompt():
    assert list_columns(Dataset.from_list(ROWS)) == ["answer", "level"]


def test_too_few_prompts_are_told_and_columns_that_a_reward_lacks():
    rows = Dataset.from_list(ROWS)
    methods = Settings(method="grpo", reward_functions=["exact_match"]).methods
    assert list(find_prompt_problems(rows, methods, 8, 4)) == []
    (problem,) = find_prompt_problems(rows, methods, 12, 4)
    assert problem.startswith("The train data has 2 prompts, and completions of 3 are written at once (12 with ")
    (problem,) = find_prompt_problems(Dataset.from_list(ROWS[1:]), methods, 4, 4)
    assert problem.startswith("reward_functions='exact_match' needs the column 'solution' or 'answer', and the rows ")
