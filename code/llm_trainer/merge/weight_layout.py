# SPDX-License-Identifier: Apache-2.0
"""The layout of a checkpoint: how its tensors become a model's parameters, and values go back from these to tensors.

Transformers renames, stacks, splits and transposes while it loads, and undoes that when it saves. Experts that are
stored one by one are one parameter, for example. Both ways are its own code (transformers/core_model_loading.py).
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from llm_trainer.common.errors import quote_error


class WeightLayout:
    """The layout of one checkpoint, and of its model on the meta device, without an adapter."""

    def __init__(self, skeleton: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
        self.skeleton = skeleton
        self.shapes = shapes  # of the checkpoint's tensors, by name
        self.stored: dict[str, str] = {}  # parameter -> tensor, where only their names may differ
        conversions = get_model_conversion_mapping(skeleton)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        parameters, prefix = skeleton.state_dict(), skeleton.base_model_prefix
        stacks = defaultdict(list)
        for name in sorted(shapes, key=dot_natural_key):
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
            if parameter not in parameters and name in parameters:
                parameter, pattern = rename_source_key(name, [], [], prefix, parameters)
            if pattern is not None:
                stacks[parameter, pattern].append(name)
            elif parameter in parameters:
                self.stored[parameter] = name
        # For each tensor that is a row (an expert) of a parameter: the name of the first row, its own index, and how
        # many rows there are.
        self.places = {name: (rows[0], index, len(rows)) for rows in stacks.values() for index, name in enumerate(rows)}
        skeleton._weight_conversions = [each for each in conversions if each.was_used()]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The parameters that are converted together, such as q, k and v of a fused tensor, by that tensor's name."""
        converters = [each.reverse_transform() for each in self.skeleton._weight_conversions[::-1]]
        converters = [each for each in converters if isinstance(each, WeightConverter)]
        groups = defaultdict(list)
        for name in self.skeleton.state_dict():
            groups[apply_converters(name, converters)[0]].append(name)
        return groups

    def find_group(self, parameter: str) -> list[str]:
        """Return the parameters that are converted together with this one, itself included."""
        return next(group for group in self.groups.values() if parameter in group)

    def revert(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of a group's parameters, or of some of their rows, as they lie in the tensors, by name."""
        reverted = revert_weight_conversion(self.skeleton, values)
        return {self.find_stored_name(name): value for name, value in reverted.items()}

    def find_stored_name(self, name: str) -> str:
        """Return a tensor's name in the checkpoint.

        Loading adds or removes the prefix of the model's body by itself, so that the checkpoint may differ in it.
        """
        prefix = f"{self.skeleton.base_model_prefix}."
        names = (name, name.removeprefix(prefix), prefix + name)
        return next((each for each in names if each in self.shapes), name)

    def try_revert(self, parameters: Iterable[str], num_rows: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shapes that `revert` gives for whole parameters, or for their first rows.

        Raise ValueError where Transformers cannot undo the conversion.
        """
        values = {name: self.skeleton.get_parameter(name)[:num_rows] for name in parameters}
        try:
            return {name: tuple(value.shape) for name, value in self.revert(values).items()}
        except (RuntimeError, NotImplementedError, StopIteration, AttributeError) as error:
            raise ValueError(quote_error(error)) from error

    def add_copy(self, parameter: str, shape: tuple[int, ...]) -> str:
        """Add a tensor for a parameter that the checkpoint does not hold, and return the tensor's name."""
        name = next(iter(self.try_revert([parameter])))
        self.stored[parameter] = name
        self.shapes[name] = shape
        return name
