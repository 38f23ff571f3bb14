# SPDX-License-Identifier: Apache-2.0
"""The check that a model keeps the rows of a packed sequence apart: an experiment on it, not a list of classes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from llm_trainer.common.errors import quote_error
from llm_trainer.model.kinds.auto_class import choose_auto_class
from llm_trainer.model.layers.reward_head import compute_states, is_reward_model

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]

# In tokens. Longest first, as a collator may sort them: the last three share a sequence, or all four do.
ROW_LENGTHS = (26, 13, 7, 5)
WATCHED = slice(2, None)  # the rows that come after others in their sequence
# How far logits may move, as a share of their spread. In the first experiment they did not move at all, in any type,
# but a GPU's atomic sums round in any order. In the second, SmolLM2-135M's middle token moved by 3e-6 in float32, 0.005
# in float16 and 0.03 in bfloat16 (CPU; sdpa, eager, flex), and float32 may be TF32, which rounds as float16 does. A
# leak moved the least token by 0.2 and the middle one by 1.
MOVED_BY_OTHERS = {torch.float32: 1e-6, torch.float16: 0.005, torch.bfloat16: 0.03}
MOVED_BY_COMPANY = {torch.float32: 0.05, torch.float16: 0.05, torch.bfloat16: 0.1}

# Sizes of the proxy model.
PROXY_VOCABULARY = 512
PROXY_WIDTH = 128  # of its layers' inner parts, be they one or 256 experts
PROXY_LAYERS = 2  # where the config does not tell the layers' kinds


def build_proxy_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a small model with the same attention, for the experiment where this model's weights are shards.

    It is as wide, and has as few layers as have each kind of the model's layers. Its weights are random, the same on
    every rank, and so large that attention tells positions apart. No random number of the training is drawn for it.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    kinds: list[str] = getattr(text, "layer_types", None) or []
    num_layers = max(kinds.index(kind) for kind in set(kinds)) + 1 if kinds else PROXY_LAYERS
    text.num_hidden_layers = min(num_layers, text.num_hidden_layers)
    if "layer_types" in vars(text):  # else they follow from other numbers
        text.layer_types = kinds[:num_layers]
    text.vocab_size, text.pad_token_id = PROXY_VOCABULARY, 0  # some configs take no None
    if hasattr(text, "vocab_size_per_layer_input"):  # of Gemma 4's second embedding
        text.vocab_size_per_layer_input = PROXY_VOCABULARY
    text.initializer_range = text.hidden_size**-0.5
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if sizes := getattr(text, name, None):  # of experts of two kinds, in Ernie 4.5
            is_list = isinstance(sizes, list)
            setattr(text, name, [min(size, PROXY_WIDTH) for size in sizes] if is_list else min(sizes, PROXY_WIDTH))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return choose_auto_class(config, is_reward_model(config)).from_config(
            config, dtype=model.dtype, attn_implementation=config._attn_implementation
        )


def find_cross_row_attention(model: PreTrainedModel, collate: Collator) -> str | None:
    """Return why packed rows would not be trained as if they were alone; None if they would be."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return compare_packed_with_separate(model, collate)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"{type(model).__name__} does not take packed rows ({quote_error(error)})"
    finally:
        model.train(was_training)


def compare_packed_with_separate(model: PreTrainedModel, collate: Collator) -> str | None:
    """Compute the watched rows' logits after other rows, and alone. Return what moves them; None where nothing does.

    The first comparison is exact in every type, as the same kernels sum the same shapes and what is masked counts as
    zero. So every token has to stay. The second is not: kernels round otherwise for other shapes, and a router may then
    choose another expert for a token. So the middle token has to stay, and positions that go on from the row before
    would move all tokens.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    rows, others = (
        [torch.randint(vocabulary, (length,), generator=generator) for length in ROW_LENGTHS] for _ in range(2)
    )
    packed = forward_packed(model, collate, rows)
    after_others = forward_packed(model, collate, [*others[: WATCHED.start], *rows[WATCHED]])
    alone = torch.cat([forward(model, input_ids=row[None])[0] for row in rows[WATCHED]])
    subject = f"{type(model).__name__} with {model.config._attn_implementation} attention"
    moved = measure_distances(after_others, packed).max().item()
    if not moved <= MOVED_BY_OTHERS[packed.dtype]:  # nor NaN
        return f"{subject} lets a row see the one before it (its logits move by {moved:.2g} of their spread)"
    moved = measure_distances(packed, alone).median().item()
    if not moved <= MOVED_BY_COMPANY[packed.dtype]:
        return f"{subject} does not begin anew with a row (its logits move by {moved:.2g} of their spread)"
    return None


def forward_packed(model: PreTrainedModel, collate: Collator, rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits [tokens, vocabulary] of the watched rows. Labels number the tokens, to find them again."""
    numbers = torch.arange(sum(map(len, rows))).split([len(row) for row in rows])
    batch = collate(
        [{"input_ids": row.tolist(), "labels": own.tolist()} for row, own in zip(rows, numbers, strict=True)]
    )
    labels = batch.pop("labels").flatten()
    del batch["num_tokens"]
    logits = forward(model, **batch).flatten(0, 1)
    second_tokens = [(labels == own[1]).nonzero().item() for own in numbers[WATCHED]]  # the first ones have no label
    return torch.cat(
        [logits[second - 1 :][: len(row)] for second, row in zip(second_tokens, rows[WATCHED], strict=True)]
    )


def forward(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Return the logits [sequences, slots, vocabulary], or hidden states of a reward model, as in training."""
    on_device = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    return compute_states(model, **on_device)


def measure_distances(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return each token's distance from the reference's logits, as a share of the reference's spread: [tokens]."""
    logits, reference = logits.float(), reference.float()
    spread = (reference - reference.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return (logits - reference).norm(dim=-1) / spread.clamp(min=1e-12)
