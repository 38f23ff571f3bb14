# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts, as trainers and rewards take them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from llm_trainer.config.generation import choose_eval_rows
from llm_trainer.config.sections import MethodSettings
from llm_trainer.config.trl_config_fields import read_snapshot
from llm_trainer.rewards.problems import find_unfit_columns

TOKENS = "input_ids"  # the key of a prompt's tokens
FILLS = "fills"  # the key that tells a prompt which only fills a batch of an evaluation
COLUMNS = (TOKENS, "content", "length")
MAX_LOOKED_AT = 1000  # rows whose columns are looked at


def collate_prompts(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as their files had them, each with all columns of the batch, and our own keys."""
    rows = [json.loads(example["content"]) for example in examples]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [
        {name: row.get(name) for name in columns} | {TOKENS: example[TOKENS], FILLS: example["length"] == 0}
        for row, example in zip(rows, examples, strict=True)
    ]


def list_columns(rows: Dataset) -> list[str]:
    """Return the names of the columns beside the prompt, of the first rows."""
    contents = rows.select(range(min(MAX_LOOKED_AT, len(rows))))["content"]
    return [*dict.fromkeys(name for content in contents for name in json.loads(content) if name != "prompt")]


def find_prompt_problems(rows: Dataset, methods: MethodSettings, num_generated: int, group: int) -> Iterator[str]:
    """Yield a sentence for each column that a reward lacks in the rows of an epoch, and where these are too few.

    `num_generated` completions are written at once, `group` of each prompt.
    """
    needed = num_generated // group
    if len(rows) < needed:
        yield (
            f"The train data has {len(rows)} prompts, and completions of {needed} are written at once "
            f"({num_generated} with num_generations={group}): give more prompts, "
            "or lower per_device_train_batch_size, gradient_accumulation_steps or global_batch_size."
        )
    yield from find_unfit_columns(methods.reward_functions, methods.reward_options, list_columns(rows))


def choose_rows_of_evaluation(method: str, given: Mapping[str, Any], num_devices: int) -> dict[str, Any]:
    """Return how many completions of an evaluation a device takes at once: whole groups, on all devices."""
    return {
        "per_device_eval_batch_size": choose_eval_rows(
            given, read_snapshot(method)["num_generations"].default, num_devices
        )
    }
