# SPDX-License-Identifier: Apache-2.0
"""The way of deltas from a model's parameters to the tensors of its checkpoint."""

from collections.abc import Iterable, Iterator

import torch

from llm_trainer.common.errors import UserError
from llm_trainer.merge.base_tensors import BaseTensor, CopiedTensor
from llm_trainer.merge.lora_deltas import ConvertedDelta, LowRankDelta, WeightDelta
from llm_trainer.merge.weight_layout import WeightLayout

FIX = "serve the adapter on the base instead."


def split_tied_embeddings(
    layout: WeightLayout,
    tensors: dict[str, BaseTensor],
    deltas: dict[str, WeightDelta],
    replaced: dict[str, torch.Tensor],
) -> bool:
    """Make tied input and output embeddings two tensors where the adapter changes them differently.

    PEFT trains only the one that it is asked for, or both alike with `ensure_weight_tying`. `tensors`, `deltas` and
    `replaced` change with the layout. Return whether the embeddings no longer are tied.
    """
    names = find_tied_embeddings(layout)
    if not any(name in deltas or name in replaced for name in names):
        return False
    absent = next((name for name in names if name not in layout.stored), None)
    first, second = (deltas.get(name) for name in names)
    if isinstance(first, LowRankDelta) and isinstance(second, LowRankDelta) and first.equals(second):
        if absent:
            del deltas[absent]
            replaced.pop(absent, None)  # PEFT saves the base's embeddings beside an adapter on them
        return False
    if absent:
        original = tensors[layout.stored[names[1 - names.index(absent)]]]
        copy_name = layout.add_copy(absent, original.shape)
        tensors[copy_name] = CopiedTensor(original, copy_name)
    return True


def find_tied_embeddings(layout: WeightLayout) -> list[str]:
    """Return the parameters' names of input and output embeddings that are one tensor; nothing where they are two."""
    skeleton = layout.skeleton
    modules = [skeleton.get_input_embeddings(), skeleton.get_output_embeddings()]
    if modules[1] is None or modules[0].weight is not modules[1].weight:
        return []
    paths = {module: name for name, module in skeleton.named_modules()}
    return [f"{paths[module]}.weight" for module in modules]


def map_deltas_to_tensors(layout: WeightLayout, deltas: dict[str, WeightDelta]) -> Iterator[tuple[str, WeightDelta]]:
    """Yield the name of each changed tensor, and the delta on it. `deltas` are on parameters, by their names.

    Raise UserError for a parameter whose delta cannot be converted back.
    """
    groups: dict[tuple[str, ...], dict[str, WeightDelta]] = {}
    for parameter, delta in deltas.items():
        if parameter in layout.stored:
            yield layout.stored[parameter], delta
        else:
            groups.setdefault(tuple(layout.find_group(parameter)), {})[parameter] = delta
    for group, own in groups.items():
        yield from convert_to_checkpoint_layout(layout, {parameter: own.get(parameter) for parameter in group})


def convert_to_checkpoint_layout(
    layout: WeightLayout, deltas: dict[str, WeightDelta | None]
) -> Iterator[tuple[str, WeightDelta]]:
    """Yield the deltas of a group of parameters on the tensors that the group is made of.

    A group is converted together; a parameter of it without a delta stays as it is. Raise UserError.
    """
    parameter = next(name for name, delta in deltas.items() if delta is not None)
    low_rank = {name: delta if isinstance(delta, LowRankDelta) else None for name, delta in deltas.items()}
    if low_rank != deltas:
        raise UserError(
            f"{parameter} lies in the base's files in another form, which DoRA cannot be merged into: {FIX}"
        )
    shapes = find_tensor_shapes(layout, deltas, parameter)
    num_rows = {len(layout.skeleton.get_parameter(name)) for name in deltas}
    row = find_row_shapes(layout, deltas)
    for name, shape in shapes.items():
        first, index, num_stacked = layout.places.get(name, (name, 0, 1))
        if row == {each: (1, *shape[1:]) for each, shape in shapes.items()}:
            yield name, ConvertedDelta(layout, low_rank, name, is_whole=False)
        elif row.get(first) == shape and num_rows == {num_stacked}:
            yield name, ConvertedDelta(layout, low_rank, name, index)
        else:
            yield name, ConvertedDelta(layout, low_rank, name)


def find_tensor_shapes(layout: WeightLayout, group: Iterable[str], changed: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a group of parameters is made of. `changed` is one that has a delta.

    Raise UserError where the conversion is not known, or the checkpoint's tensors are others.
    """
    try:
        shapes = layout.try_revert(group)
    except ValueError as error:
        raise UserError(f"{changed} lies in the base's files in a form that is not known ({error}): {FIX}") from error
    for name, shape in shapes.items():
        if name not in layout.shapes:
            raise UserError(f"The base's files lack {name}, a part of {changed}, which the adapter changes.")
        if layout.shapes[name] != shape:
            raise UserError(
                f"{name} has shape {list(layout.shapes[name])} in the base's files, and a change of {changed} would "
                f"have {list(shape)} there: {FIX}"
            )
    return shapes


def find_row_shapes(layout: WeightLayout, parameters: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that one row (an expert) of each parameter becomes.

    Nothing comes back where rows are not converted apart from each other.
    """
    if any(layout.skeleton.get_parameter(name).ndim < 3 for name in parameters):
        return {}
    try:
        return layout.try_revert(parameters, num_rows=1)
    except ValueError:
        return {}
