# SPDX-License-Identifier: Apache-2.0
"""The tower of a model that sees images: its encoders of images and sounds, and what projects them to tokens' vectors.

It is found by the model's structure: all that is no part of the decoder, the embeddings or the head.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.model.kinds.auto_class import sees_images
from llm_trainer.model.layers.reward_head import find_head


def list_tower(model: PreTrainedModel) -> list[str]:
    """Return the names of the tower's parameters; none for a model of texts alone. A tied one comes once."""
    if not sees_images(model.config):
        return []
    language = {*list_language(model)}
    return [name for name, parameter in model.named_parameters() if parameter not in language]


def list_language(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yield the parameters of the decoder, without models of other types within it, of embeddings and the head."""
    decoder = model.get_decoder()
    parts = [module for module in decoder.modules() if isinstance(module, PreTrainedModel)]
    others = [
        part for part in parts if part.config.model_type != decoder.config.model_type
    ]  # such as an image tokenizer
    within = {parameter for part in others for parameter in part.parameters()}
    yield from (parameter for parameter in decoder.parameters() if parameter not in within)
    for module in (model.get_input_embeddings(), find_head(model)):
        yield from module.parameters() if module is not None else ()


def freeze_tower(model: PreTrainedModel) -> None:
    """Have a training leave the tower as it is."""
    for name in list_tower(model):
        model.get_parameter(name).requires_grad_(False)


def learns_to_see(model: PreTrainedModel) -> bool:
    """Tell whether a training changes any weight of the tower, or of an adapter within it."""
    return any(model.get_parameter(name).requires_grad for name in list_tower(model))


def spare_gradients(model: PreTrainedModel) -> None:
    """Have frozen parts of a tower compute as after the training, and without gradients but behind trained parts.

    For recomputed layers, libraries have the output of every embedding ask for a gradient, a tower's too. The training
    would go back through all of it for nothing. Norms over batches, as in FastVLM, would go on changing. `model` has
    its adapter already.
    """
    modules = dict(model.named_modules())
    parts = (modules[name] for name in name_parts(model) if name in modules)
    for part in parts:
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval().train = partial(stay_as_after_training, part)
            modes: list[bool] = []  # of the calls that go on
            part.register_forward_pre_hook(partial(switch_gradients_off, modes), with_kwargs=True)
            part.register_forward_hook(partial(restore_gradients, modes), always_call=True)


def stay_as_after_training(part: nn.Module, mode: bool = True) -> nn.Module:
    """Return a part as it is, whatever mode the model around it is put in."""
    return part


def switch_gradients_off(modes: list[bool], part: nn.Module, places: Any, names: Any) -> None:
    """Compute what follows without gradients where no input needs one. Remember in `modes` whether they were on."""
    modes.append(torch.is_grad_enabled())
    needed = any(isinstance(each, torch.Tensor) and each.requires_grad for each in tree_leaves((places, names)))
    torch.set_grad_enabled(modes[-1] and needed)


def restore_gradients(modes: list[bool], *call: Any) -> None:
    """Compute what follows with gradients, or without, as before `switch_gradients_off`."""
    torch.set_grad_enabled(modes.pop())


def name_parts(model: PreTrainedModel) -> list[str]:
    """Return the names of the largest modules that are in the tower whole, and of parameters beside them."""
    tower = list_tower(model)
    mixed = {*list_parents(name for name, _ in model.named_parameters() if name not in {*tower})}
    parts = [next((parent for parent in list_parents([name]) if parent not in mixed), name) for name in tower]
    return list(dict.fromkeys(parts))


def list_parents(names: Iterable[str]) -> Iterator[str]:
    """Yield the names of the modules that parameters lie in, of each parameter the outermost first."""
    for name in names:
        places = [place for place, letter in enumerate(name) if letter == "."]
        yield from (name[:place] for place in places)


def check_tower(model: str, skeleton: PreTrainedModel, train_vision: bool) -> None:
    """Raise UserError where a tower shall be trained and the model has none."""
    if train_vision and not list_tower(skeleton):
        raise UserError(
            f"train_vision=true: model_id={model!r} is a {type(skeleton).__name__}, which has no part that sees "
            "images: leave train_vision out."
        )


def describe_tower(model: PreTrainedModel, train_vision: bool) -> Iterator[str]:
    """Yield a line for the log about a model's tower."""
    if tower := list_tower(model):
        num_weights = sum(model.get_parameter(name).numel() for name in tower)
        fate = "trained" if train_vision else "frozen: train_vision=true trains them"
        yield f"Vision: {', '.join(name_parts(model))} ({num_weights:,} weights) are {fate}"
