# SPDX-License-Identifier: Apache-2.0
"""An output layer that keeps its logits where these are few, for a training on a CPU.

TRL's computes them in pieces, throws them away, and computes them once more for the gradients. That saves a
GPU's memory. On a CPU it costs a small model 3 % of its step: a third product with the largest of its matrices.
"""

from typing import Any

import torch
from torch.nn.functional import linear, log_softmax
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import _torch_transform
from trl.trainer import utils as trl_utils

from llm_trainer.common.units import MIB

# Of logits. Beside them are as many logarithms and gradients, and TRL's pieces would take about as much.
MAX_LOGITS_BYTES = 64 * MIB


def keep_few_logits() -> None:
    """Have TRL's output layer keep few logits. It has no option for it: a name is replaced in this process."""
    trl_utils._ChunkedLogProbFunction = KeptLogits


class KeptLogits:
    """The function that TRL's output layer applies to scored tokens, by the name that it has there."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
        """Return what ChunkedLogProbFunction returns for these arguments.

        `hidden` is [tokens, width] and `weight` [vocabulary, width].
        """
        num_bytes = hidden.element_size() * len(hidden) * len(weight)
        is_plain = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        if hidden.device.type != "cpu" or num_bytes > MAX_LOGITS_BYTES or not is_plain:
            return ChunkedLogProbFunction.apply(hidden, weight, *arguments)
        return score_tokens(hidden, weight, *arguments)


def score_tokens(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, *scaling: Any
) -> tuple[torch.Tensor | None, ...]:
    """Return what TRL's output layer does of each token, each [tokens], and None where `outputs` does not name it.

    `scaling` is TRL's: temperature, size of a piece, soft cap of the logits, scale of the logits, and names of outputs.
    """
    temperature, _, softcap, scale, outputs = scaling
    logits = linear(hidden, weight, bias)
    if (temperature, softcap, scale) != (1.0, None, 1.0):
        logits = _torch_transform(logits, scale, softcap or 1.0, 1 / temperature, softcap is not None)
    logs = log_softmax(logits, -1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(-1) if "entropy" in outputs else None
        sum_squares = (2 * logs).logsumexp(-1) if "log_sum_sq_probs" in outputs else None
        mean_logits = logits.mean(-1) if "mean_logits" in outputs else None
        is_top1 = logits.argmax(-1) == targets if "is_top1" in outputs else None
    return logs.gather(-1, targets[:, None]).squeeze(-1), entropy, sum_squares, mean_logits, is_top1
