# SPDX-License-Identifier: Apache-2.0
"""Few logits are kept on a CPU, and give what TRL's pieces give; many are not."""

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from llm_trainer.model.layers import kept_logits
from llm_trainer.model.layers.kept_logits import KeptLogits

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SCALINGS = {"plain": (1.0, None, 1.0), "soft cap": (1.0, 5.0, 1.0), "all": (0.7, 5.0, 0.25)}


def score(function, temperature, softcap, scale, dtype=torch.float32, num_tokens=11):
    """Return what comes out, and the gradients of hidden states, weights and bias."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=draw).to(dtype) for shape in ((num_tokens, 16), (300, 16), (300,))]
    targets = torch.randint(300, (num_tokens,), generator=draw)
    for part in parts:
        part.requires_grad_()
    outputs = function.apply(*parts, targets, temperature, 128, softcap, scale, OUTPUTS)
    (-outputs[0].sum()).backward()
    return [each.detach() for each in outputs if each is not None], [part.grad for part in parts]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("num_tokens", [11, 0])
def test_kept_logits_give_the_same_as_pieces(scaling, num_tokens):
    found, gradients = score(KeptLogits, *SCALINGS[scaling], num_tokens=num_tokens)
    expected, expected_gradients = score(ChunkedLogProbFunction, *SCALINGS[scaling], num_tokens=num_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


def test_only_few_logits_of_float32_are_kept(monkeypatch):
    kept, keep = [], kept_logits.score_tokens
    monkeypatch.setattr(kept_logits, "score_tokens", lambda *arguments: kept.append(1) or keep(*arguments))
    score(KeptLogits, *SCALINGS["plain"])
    assert kept == [1]
    score(KeptLogits, *SCALINGS["plain"], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        score(KeptLogits, *SCALINGS["plain"])
    monkeypatch.setattr(kept_logits, "MAX_LOGITS_BYTES", 4 * 11 * 300 - 1)
    score(KeptLogits, *SCALINGS["plain"])
    assert kept == [1]
