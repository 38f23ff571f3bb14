# SPDX-License-Identifier: Apache-2.0
"""The reference of preference losses: the model as the training begins, which no second model in memory has to be.

It is the base without the adapter. An adapter that does not begin at zero has a frozen copy of its first values.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from llm_trainer.model.lora_init import ADAPTER

REFERENCE = "ref"  # the name by which TRL's trainers look for the copy


def keep_own_reference(trl_module: ModuleType) -> None:
    """Have a module of TRL neither load a second model for the reference, nor recompute all layers after its use.

    TRL has no options for it: two names are replaced in this process. After a reference's forward pass, TRL would
    recompute the activations of those layers, too, that keep them.
    """
    trl_module.create_model_from_path = lambda *arguments, **options: None  # type: ignore[attr-defined]
    trl_module.disable_gradient_checkpointing = lambda *arguments: nullcontext()  # type: ignore[attr-defined]


@torch.no_grad()
def copy_adapter(model: PeftModel) -> None:
    """Give the model a frozen copy of its adapter, for the reference of an adapter that does not begin at zero."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.init_lora_weights = True  # its values come from the adapter, and the base stays as it is
    model.add_adapter(REFERENCE, config)
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            model.get_parameter(name.replace(f".{ADAPTER}.", f".{REFERENCE}.")).copy_(parameter)
    freeze(model)


def freeze(model: nn.Module) -> None:
    """Have no optimizer and no rank's gradients see the copy."""
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.requires_grad_(False)


@contextmanager
def hide_copy(model: Any) -> Iterator[None]:
    """Have PEFT write the trained adapter alone in this context."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    config = configs.pop(REFERENCE, None)
    try:
        yield
    finally:
        if config is not None:
            configs[REFERENCE] = config
