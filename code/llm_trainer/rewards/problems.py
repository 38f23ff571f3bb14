# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the choice of rewards, found before anything is loaded that takes long."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trainer.common.errors import UserError
from llm_trainer.rewards.choice import Choice, parse_choice, read_schema
from llm_trainer.rewards.options import OPTIONS, find_column_problems, find_option_problems, suggest
from llm_trainer.rewards.own_function import OWN_ARGUMENTS
from llm_trainer.rewards.rewards import LOAD_SECONDS, load_reward


def find_problems(
    reward_functions: Sequence[str],
    reward_options: Mapping[str, Mapping[str, Any]],
    reward_weights: Sequence[float] | None,
    channels: Mapping[str, Path],
    columns: Collection[str] | None,
) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with rewards, their options and weights.

    `columns` are those of the rows beside `prompt`, None where they are not known. Files of the user are imported, each
    in a process of its own.
    """
    if not reward_functions:
        yield "reward_functions is empty, and each completion needs a reward: name one, such as 'exact_match'."
    yield from find_weight_problems(reward_weights, len(reward_functions))
    for name in reward_options:
        if name not in reward_functions:
            yield f"reward_options names {name!r}, which is not in reward_functions: {suggest(name, reward_functions)}"
    yield from find_taken_columns(columns or ())
    choices: list[Choice] = []
    for entry in reward_functions:
        try:
            choices.append(parse_choice(entry, reward_options.get(entry, {}), channels))
        except UserError as error:
            yield from error.problems
    yield from find_repeated_names(choices)
    for choice in {choice.entry: choice for choice in choices}.values():
        yield from find_choice_problems(choice, channels, columns)


def find_taken_columns(columns: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each column whose name is an argument that every reward function gets."""
    for name in sorted({*OWN_ARGUMENTS} & {*columns}):
        yield f"the rows have a column {name!r}, which a reward function gets from the trainer: rename the column."


def find_unfit_columns(
    reward_functions: Sequence[str], reward_options: Mapping[str, Mapping[str, Any]], columns: Collection[str]
) -> list[str]:
    """Return a sentence for each column that the rows have and should not, or that a built-in reward lacks."""
    problems = list(find_taken_columns(columns))
    for name in reward_functions:
        if name in OPTIONS:
            problems += find_column_problems(name, reward_options.get(name, {}), columns)
    return problems


def find_weight_problems(reward_weights: Sequence[float] | None, num_functions: int) -> Iterator[str]:
    """Yield sentences on weights that are no numbers, too many or too few."""
    if reward_weights is None:
        return
    if len(reward_weights) != num_functions:
        yield (
            f"reward_weights has {len(reward_weights)} weights for {num_functions} reward_functions: give one for "
            "each, in their order."
        )
    for weight in reward_weights:
        if not math.isfinite(weight):
            yield f"reward_weights has {weight}: give a finite number."


def find_repeated_names(choices: Sequence[Choice]) -> Iterator[str]:
    """Yield a sentence where two rewards would share a name, by which TRL logs them."""
    for name, count in Counter(choice.name for choice in choices).items():
        if count > 1:
            entries = " and ".join(repr(choice.entry) for choice in choices if choice.name == name)
            yield f"reward_functions has {entries}, which are both logged as {name!r}: rename or remove one."


def find_choice_problems(
    choice: Choice, channels: Mapping[str, Path], columns: Collection[str] | None
) -> Iterator[str]:
    """Yield what is wrong with one reward. It is loaded only where nothing else is."""
    problems = [] if choice.file else list(find_option_problems(choice.name, choice.options))
    if columns is not None and not choice.file and not problems:
        problems += find_column_problems(choice.name, choice.options, columns)
    if not problems:
        try:
            with load_reward(read_schema(choice, channels), LOAD_SECONDS, columns):
                pass
        except UserError as error:
            problems += error.problems
    yield from problems
