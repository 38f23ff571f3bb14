# SPDX-License-Identifier: Apache-2.0
"""A text without images on its way through an image-text model: what the model's class demands of it.

The answers come from an experiment on the skeleton, not from a list of classes.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.model.kinds.auto_class import sees_images
from llm_trainer.model.layers.reward_head import is_reward_model

NUM_TOKENS = 8
BACKBONE = "text_backbone"  # the name under which a class without a backbone of its own gets one
DEMANDS_IMAGES = re.compile("pixel_values|image|patches|bbox", re.IGNORECASE)
DEMANDS_TYPES = re.compile(r"(\w*token_type_ids)\W+is required")


def attempt_text(skeleton: PreTrainedModel) -> Exception | None:
    """Return what the class of an image-text model raises for a text in a training. `skeleton` is on the meta device.

    The device has no numbers. A class that asks for some fails by that, which tells nothing about texts.
    """
    was_training = skeleton.training
    skeleton.train()
    try:
        with torch.no_grad():
            skeleton(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta"), use_cache=False)
    except Exception as error:  # the code of any model runs here
        return error
    finally:
        skeleton.train(was_training)
    return None


def check_texts(model: str, skeleton: PreTrainedModel) -> None:
    """Raise UserError for an image-text model that cannot be trained to continue texts without images."""
    if not sees_images(skeleton.config):
        return
    kind = f"model_id={model!r} is a {type(skeleton).__name__}"
    if skeleton.config.is_encoder_decoder or skeleton.config.get_text_config().is_encoder_decoder:
        raise UserError(f"{kind}, which encodes texts before it answers: give a decoder such as Qwen3-VL or Gemma 3.")
    generates = skeleton.can_generate() and hasattr(skeleton, "prepare_inputs_for_generation")
    if not (generates or is_reward_model(skeleton.config)):
        raise UserError(f"{kind}, which does not write token by token: give a decoder such as Qwen3-VL or Gemma 3.")
    error = attempt_text(skeleton)
    if isinstance(error, (TypeError, ValueError)) and DEMANDS_IMAGES.search(str(error)):
        raise UserError(f"{kind}, which takes no text without an image ({quote_error(error)}): give another model.")


def find_token_types(skeleton: PreTrainedModel) -> str | None:
    """Return the name of the input by which a model's class demands to be told, in a training, what no image is."""
    error = attempt_text(skeleton) if sees_images(skeleton.config) else None
    demanded = DEMANDS_TYPES.search(str(error)) if isinstance(error, ValueError) else None
    return demanded[1] if demanded else None


def give_token_types(model: PreTrainedModel, name: str | None) -> None:
    """Have a model be told that all tokens are text, where a batch says nothing about them. None: it asks for nothing.

    `name` is the input's, as `find_token_types` returns it.
    """
    if name is not None:
        model.base_model.register_forward_pre_hook(partial(add_token_types, name), with_kwargs=True)


def add_token_types(name: str, module: nn.Module, places: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """Return a module's inputs, with zeros for each token's type where a training gives none."""
    tokens = inputs.get("input_ids", places[0] if places else None)
    if not module.training or tokens is None or inputs.get(name) is not None:
        return None
    return places, {**inputs, name: torch.zeros_like(tokens)}


def expose_backbone(model: PreTrainedModel) -> None:
    """Have a class that holds a whole causal language model tell its output layer, and by `base_model` what is below.

    Such a class has no backbone of its own, and TRL's loss asks for one. Texts take the same way through both.
    """
    if not sees_images(model.config) or model.base_model is not model:
        return
    inner = model.get_decoder()
    backbone = next((child for child in inner.children() if isinstance(child, PreTrainedModel)), None)
    if inner is not model and inner.get_output_embeddings() is not None and backbone is not None:
        model.get_output_embeddings = inner.get_output_embeddings
        model.base_model_prefix = BACKBONE
        model.__dict__[BACKBONE] = backbone  # no second place for the same parameters


def has_exposed_backbone(model: PreTrainedModel) -> bool:
    """Tell whether a model is of a class that holds a whole causal language model."""
    return BACKBONE in vars(model)
