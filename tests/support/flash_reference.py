# SPDX-License-Identifier: Apache-2.0
"""PyTorch's flash attention for a CPU, which has no code for it: a loop over rows, in the type of the queries."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch


@contextmanager
def flash_attention_on_the_cpu() -> Iterator[list[tuple[int, int]]]:
    """Give the operators code for the CPU. Yields the calls of the forward pass: (heads, heads of keys)."""
    calls: list[tuple[int, int]] = []

    def forward(q, k, v, *arguments, **options):
        calls.append((q.shape[1], k.shape[1]))
        seed = torch.zeros(2, dtype=torch.uint64)
        normalizers = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
        return attend(q, k, v, *arguments, **options), normalizers, seed, torch.empty(0), torch.empty(0)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", differentiate, "CPU")
        yield calls


def attend(q, k, v, starts_q, starts_k, max_q, max_k, dropout, is_causal, return_debug_mask=False, **options):
    """The result for rows end to end: [tokens, heads, size]."""
    assert not dropout
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in (q, k, v))
    assert (max_q, max_k) == (starts_q.diff().max(), starts_k.diff().max())
    _, v = share_heads(q, k, v)
    rows = list_weights(q, k, starts_q, starts_k, is_causal, **options)
    return torch.cat([torch.einsum("hqk,khd->qhd", weights, v[keys]) for _, keys, weights, _ in rows])


def differentiate(
    gradient, q, k, v, out, normalizers, starts_q, starts_k, max_q, max_k, dropout, is_causal, *seeds, **options
):
    """The gradients of queries, keys and values, by the chain rule."""
    of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
    all_k, all_v = share_heads(q, k, v)
    for queries, keys, weights, scale in list_weights(q, k, starts_q, starts_k, is_causal, **options):
        of_weights = torch.einsum("qhd,khd->hqk", gradient[queries], all_v[keys])
        of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) * scale
        of_q[queries] = torch.einsum("hqk,khd->qhd", of_scores, all_k[keys])
        shared = k.shape[1], q.shape[1] // k.shape[1]
        of_k[keys] = torch.einsum("hqk,qhd->khd", of_scores, q[queries]).unflatten(1, shared).sum(dim=2)
        of_v[keys] = torch.einsum("hqk,qhd->khd", weights, gradient[queries]).unflatten(1, shared).sum(dim=2)
    return of_q, of_k, of_v


def share_heads(q, k, v):
    """Keys and values for each head of the queries."""
    return tuple(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))


def list_weights(
    q, k, starts_q, starts_k, is_causal, scale=None, window_size_left=None, window_size_right=None, **options
):
    """Each row's places among queries and keys, its weights [heads, queries, keys], and the scores' scale.

    The last query of a row stands at its last key.
    """
    assert all(option is None for option in options.values())
    left, right = (-1 if size is None else size for size in (window_size_left, window_size_right))
    scale, right = scale or q.shape[-1] ** -0.5, 0 if is_causal else right
    k, _ = share_heads(q, k, k)
    for bounds_q, bounds_k in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        queries, keys = slice(*bounds_q), slice(*bounds_k)
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * scale
        num_q, num_k = scores.shape[1:]
        ahead = torch.arange(num_k) - (torch.arange(num_q)[:, None] + num_k - num_q)  # of a key before its query
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= ahead > right if right >= 0 else hidden
        hidden |= ahead < -left if left >= 0 else hidden
        yield queries, keys, scores.masked_fill(hidden, float("-inf")).softmax(dim=-1), scale
