# SPDX-License-Identifier: Apache-2.0
"""flash-attn's functions by PyTorch's own copy of FlashAttention 2, for a GPU machine without flash-attn's wheel.

Dao 2023, arXiv:2307.08691. What the copy lacks is not taken: dropout, soft-capping and determinism.
"""

import torch

__version__ = "2.8.3"
flash_attn_with_kvcache = None  # paged inference, which no training needs


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> torch.Tensor:
    """Attend in [batch, length, heads, size] and return the same shape."""
    lengths = (None, None, q.shape[1], k.shape[1])
    return attend(q, k, v, lengths, softmax_scale, causal, window_size, dropout_p)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> torch.Tensor:
    """Attend within each of the rows that lie end to end in [tokens, heads, size], and return the same shape."""
    lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    return attend(q, k, v, lengths, softmax_scale, causal, window_size, dropout_p)


def attend(q, k, v, lengths, scale, causal, window_size, dropout_p):
    """Call PyTorch's operator, which has a backward pass of its own."""
    if dropout_p:
        raise NotImplementedError("dropout of attention weights")
    left, right = (None if size is None or size < 0 else size for size in window_size)
    if causal and left is not None:
        right = 0
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, causal, False, scale=scale, window_size_left=left, window_size_right=right
    )[0]
