# SPDX-License-Identifier: Apache-2.0
"""The class of Transformers that builds the model of a config: this is the one place that chooses it."""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)


def choose_auto_class(config: PreTrainedConfig, is_reward: bool = False) -> Any:
    """Return Transformers' class that builds a reward model, a model that sees images, or a causal language model."""
    if is_reward:
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def sees_images(config: PreTrainedConfig) -> bool:
    """Tell whether a config is of an image-text model, which is loaded and written with all of its parts.

    Transformers has a causal language model for some of these types, too, which leaves the other parts out. It is taken
    where the checkpoint itself names it. Code that comes with the model registers classes of its own.
    """
    whole = find_class(AutoModelForImageTextToText, config)
    if whole is None:
        own = getattr(config, "auto_map", None) or {}
        return AutoModelForImageTextToText.__name__ in own and AutoModelForCausalLM.__name__ not in own
    language = find_class(AutoModelForCausalLM, config)
    return whole == language or language not in (config.architectures or ())


def is_trainable(config: PreTrainedConfig) -> bool:
    """Tell whether Transformers, or code that comes with the model, has a class of it that continues texts."""
    own = getattr(config, "auto_map", None) or {}
    return sees_images(config) or AutoModelForCausalLM.__name__ in own or bool(find_class(AutoModelForCausalLM, config))


def find_class(auto_class: Any, config: PreTrainedConfig) -> str | None:
    """Return the name of the class by which one of Transformers' automatic classes builds a config; None without."""
    mapping = auto_class._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return (found[0] if isinstance(found, tuple) else found).__name__
