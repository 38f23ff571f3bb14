# SPDX-License-Identifier: Apache-2.0
"""Positions of a model: rows of a table, beyond which it fails, or computed ones, beyond which it is untrained."""

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.config.sections import DataSettings
from llm_trainer.model.kinds.tower import list_tower

TABLE_NAMES = re.compile("wpe|pos")  # of GPT-2's table, and of all others' in Transformers
# Families without a table whose attention is made for so many tokens: the name that their configs have for it.
FIXED_LENGTHS = {"mpt": "max_seq_len"}


def count_positions(model: PreTrainedModel) -> int | None:
    """Return the tokens of the longest row that the model's table of positions has rows for.

    None where positions are computed, as rotary ones are. A table may have rows beside those of positions: OPT's begins
    with two.
    """
    config = model.config.get_text_config()
    if name := FIXED_LENGTHS.get(config.model_type):
        return int(getattr(config, name))
    limit = getattr(config, "max_position_embeddings", None)
    tower = {name.rpartition(".")[0] for name in list_tower(model)}  # it counts the patches of an image
    for name, table in (*model.named_modules(), *model.named_buffers()):
        if name in tower or not TABLE_NAMES.search(name.rpartition(".")[2]):
            continue
        if isinstance(table, torch.nn.Embedding) and table.num_embeddings - getattr(table, "offset", 0) == limit:
            return limit
        if isinstance(table, torch.Tensor) and table.ndim == 2 and len(table) == limit:
            return limit
    return None


def bound_length(settings: DataSettings, num_positions: int | None, num_written: int = 0) -> DataSettings:
    """Return the settings with a default of `max_length` that a model with so many positions can take.

    The model writes up to `num_written` tokens behind a row.

    Rows that share a sequence each begin at position 0, so that only the rows' lengths count. Raises UserError where
    the user's own settings make rows that are longer.
    """
    if num_positions is None:
        return settings
    has = f"the model has a table of {num_positions} positions"
    if num_written:
        has += f" with max_completion_length={num_written} of them for completions"
        num_positions -= num_written
        if num_positions < 2:
            raise UserError(f"{has[0].upper()}{has[1:]}: lower max_completion_length.")
    if not settings.is_given("max_length"):
        settings = settings.fill_in(max_length=min(settings.max_length or num_positions, num_positions))
    length, multiple = settings.max_length, settings.pad_to_multiple_of
    multiple = int(multiple) if str(multiple).isdigit() else 1  # auto pads to none, but on Neuron
    if length is None or length > num_positions:
        given = "null" if length is None else length
        raise UserError(f"max_length={given} and {has}: give at most max_length={num_positions}.")
    if length + -length % multiple > num_positions:
        raise UserError(
            f"pad_to_multiple_of={multiple} pads rows of max_length={length} to {length + -length % multiple} tokens "
            f"and {has}: leave it out, or lower max_length."
        )
    return settings


def find_length_warnings(config: PreTrainedConfig, longest_row: int, max_length: int | None) -> Iterator[str]:
    """Yield a sentence where rows, as they are trained on, are longer than what the model was made for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = min(longest_row, max_length or longest_row)
    if limit is not None and longest > limit:
        yield (
            f"rows have up to {longest} tokens and the model's config names {limit} (max_position_embeddings): it may "
            "not know positions beyond, and servers refuse them. Scale its rope, or lower max_length."
        )
