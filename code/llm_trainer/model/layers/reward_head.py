# SPDX-License-Identifier: Apache-2.0
"""The head of a reward model: one number for a whole sequence, read from the hidden state of its last token.

A config tells by its first architecture whether its model has one. Transformers' own heads look for the last token by
the padding, and score every token. Here the caller tells the tokens, so that sequences may share a row.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from llm_trainer.common.errors import UserError

HEAD = "score"  # the name of the head in every decoder of Transformers
SUFFIX = "ForSequenceClassification"
# What a reward model's config says. vLLM squeezes the number of a model of another kind between 0 and 1.
CONFIG_VALUES = {"num_labels": 1, "problem_type": "regression"}


def is_reward_model(config: PreTrainedConfig) -> bool:
    """Tell whether the model of a config gives rewards in the place of tokens."""
    return (config.architectures or [""])[0].endswith(SUFFIX)


def check_classifier(model: str, config: PreTrainedConfig) -> None:
    """Raise UserError for a model that is a classifier of several labels, or that has no head for rewards at all."""
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"method=reward: model_id={model!r} is of type {config.model_type}, for which Transformers has no model "
            "with a head for rewards: give a model of another type, such as Llama or Qwen3."
        )
    if is_reward_model(config) and config.num_labels != 1:
        raise UserError(
            f"method=reward: model_id={model!r} is a classifier with {config.num_labels} labels, and a reward model "
            "has one: give a causal language model or a reward model."
        )


def describe_rewards(config: PreTrainedConfig) -> None:
    """Have a causal language model's config tell of a reward model on the same decoder."""
    for name, value in CONFIG_VALUES.items():
        setattr(config, name, value)
    config.architectures = [AutoModelForSequenceClassification._model_mapping[type(config)].__name__]


def find_head(model: PreTrainedModel) -> nn.Module | None:
    """Return what a model computes its result with: the head of rewards, or the output layer. None without one."""
    return getattr(model, HEAD, None) if is_reward_model(model.config) else model.get_output_embeddings()


def compute_states(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Return a vector for each token [sequences, slots, numbers]: the logits, or a reward model's hidden states."""
    if is_reward_model(model.config):
        return model.base_model(**inputs, use_cache=False).last_hidden_state
    return model(**inputs, use_cache=False).logits


def read_last_tokens(model: PreTrainedModel) -> None:
    """Have a reward model give the rewards of the tokens that `ends` names, else of each sequence's last slot.

    `ends` [answers] counts the slots of all sequences. The rewards [answers, 1] come in the type of the head.
    """

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
        labels: Any = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        hidden = self.base_model(input_ids, **inputs).last_hidden_state
        hidden = hidden[:, -1] if ends is None else hidden.flatten(0, 1).index_select(0, ends)
        head = getattr(self, HEAD)
        return SequenceClassifierOutput(logits=head(hidden.to(next(head.parameters()).dtype)))

    model.forward = MethodType(forward, model)
