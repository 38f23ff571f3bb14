# SPDX-License-Identifier: Apache-2.0
"""The check that a model is causal and TRL's loss its own: an experiment on the model, not a list of classes.

TRL multiplies the decoder's output with the weights of the output layer. What a class computes between the two, and
scales that TRL does not know, would be left out of the loss without a word.
"""

import torch
from torch import nn
from torch.nn.functional import log_softmax

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.model.lora import find_base_model

NUM_ROWS, NUM_TOKENS = 2, 8
# How far a token's logits may move with the last token, as a share of the largest. Other kernels may round otherwise.
# Encoders with two layers of random weights moved them by 0.0003 and more in float32.
MOVED = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
# How far the two losses may lie apart, as a share of the loss.
APART = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
FIX = "give another model."


def check_loss(
    model: nn.Module, vocabulary_size: int, device: torch.device, dtype: torch.dtype, temperature: float = 1.0
) -> None:
    """Raise UserError for a model that TRL's loss would not train as a causal language model.

    `model` is the trainer's, with TRL's output layer, and computes in `dtype`. Its code may fail with TRL's loss, too.
    The loss is of logits that are divided by `temperature`.
    """
    was_training = model.training
    model.eval()
    rows = torch.randint(vocabulary_size, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, after_others = compute_logits(model, rows)
            problem = find_dependence(logits, after_others, MOVED[dtype])
            problem = problem or find_other_loss(model, rows, logits / temperature, APART[dtype])
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"The model does not compute with TRL's loss ({quote_error(error)}): {FIX}") from error
    finally:
        model.train(was_training)
    if problem:
        raise UserError(problem)


def check_rewards(model: nn.Module, vocabulary_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where rewards are not those that Transformers computes, by code of the model's class.

    `model` is the trainer's, which reads the rewards of packed sequences, and computes in `dtype`.
    """
    was_training = model.training
    model.eval()
    base = find_base_model(model)
    row = torch.randint(vocabulary_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    row[row == base.config.get_text_config().pad_token_id] += 1  # which Transformers would pass over
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = model(input_ids=row, use_cache=False).logits.item()
            own = type(base).forward(base, input_ids=row, use_cache=False).logits.item()
    finally:
        model.train(was_training)
    if not abs(found - own) <= APART[dtype] * max(1.0, abs(own)):
        raise UserError(
            f"The model's last token has the reward {found:.4g}, and Transformers computes {own:.4g}: its head does "
            f"more than that; {FIX}"
        )


def compute_logits(model: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of all tokens but the last, and those that they get where another token is the last one.

    `rows` holds token ids [rows, tokens]. The logits [rows, tokens - 1, vocabulary] come as in training: without a
    cache. One pass computes both, which takes as long as one of them where the weights are many.
    """
    others = rows.clone()
    others[:, -1] = rows[:, 0]
    logits = model(input_ids=torch.cat([rows, others]), use_cache=False).logits[:, :-1].float()
    return logits[: len(rows)], logits[len(rows) :]


def find_dependence(logits: torch.Tensor, after_others: torch.Tensor, limit: float) -> str | None:
    """Return a sentence where tokens depend on those after them, else None. The arguments are `compute_logits`'s."""
    moved = ((after_others - logits).abs().max() / logits.abs().max()).item()
    if moved <= limit:
        return None
    return f"The model lets a token see those after it (its logits move by {moved:.2g}): it is no decoder; {FIX}"


def find_other_loss(model: nn.Module, rows: torch.Tensor, logits: torch.Tensor, limit: float) -> str | None:
    """Return a sentence where TRL's loss is not the loss of the model's logits, else None."""
    own = -log_softmax(logits, -1).gather(-1, rows[:, 1:, None]).mean().item()
    found = -model(input_ids=rows, labels=rows, fused_lm_head=True).log_probs.sum().item() / rows[:, 1:].numel()
    if abs(found - own) <= limit * max(1.0, abs(own)):
        return None
    return f"TRL's loss of the model is {found:.4g}, and its own logits give {own:.4g}: it would learn wrongly; {FIX}"
