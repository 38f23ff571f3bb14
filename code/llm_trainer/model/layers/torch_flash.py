# SPDX-License-Identifier: Apache-2.0
"""Flash attention 2 of PyTorch itself, for Transformers' models: no package has to be compiled for it.

Dao 2023, arXiv:2307.08691. Transformers prepares the batch as it does for the package flash-attn: padding, packed rows,
caches and number types. Only the two functions that compute are PyTorch's.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypedDict, Unpack

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward

NAME = "flash_attention_torch"  # Transformers knows all flash attention by the word "flash"


class Options(TypedDict, total=False):
    """The options of flash-attn's functions that PyTorch has too. Dropout is there to be refused."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]  # keys before and after a query; -1: all
    dropout_p: float


class RowOptions(Options, total=False):
    """The options, with the rows' bounds, from 0 to the number of tokens, and the length of the longest."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int | torch.Tensor
    max_seqlen_k: int | torch.Tensor


def attend_sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[Options]) -> torch.Tensor:
    """Attend within each sequence of a batch without padding: [sequences, tokens, heads, size], as flash_attn_func.

    The last query stands at the last key. There may be more keys than queries, as a cache has.
    """
    (num_sequences, num_queries), num_keys = q.shape[:2], k.shape[1]
    bounds_q, bounds_k = (
        torch.arange(0, num_sequences * length + 1, length, dtype=torch.int32, device=q.device)
        for length in (num_queries, num_keys)
    )
    out = attend_rows(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=bounds_q,
        cu_seqlens_k=bounds_k,
        max_seqlen_q=num_queries,
        max_seqlen_k=num_keys,
        **options,
    )
    return out.unflatten(0, (num_sequences, num_queries))


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[RowOptions]) -> torch.Tensor:
    """Attend within rows that lie end to end: [tokens, heads, size], as flash_attn_varlen_func.

    Raise NotImplementedError for dropout.
    """
    if options.get("dropout_p"):
        raise NotImplementedError(f"{NAME} has no dropout: give attn_implementation=sdpa")
    left, right = options.get("window_size", (-1, -1))
    return load_kernel()(
        *(q, k, v, options["cu_seqlens_q"], options["cu_seqlens_k"]),
        *(int(options["max_seqlen_q"]), int(options["max_seqlen_k"])),
        scale=options.get("softmax_scale"),
        window_size=(left, 0 if options.get("causal") else right),
    )


# Transformers hands a function the options that its signature names.
attend_rows.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in RowOptions.__annotations__]
)


@cache
def load_kernel() -> Callable[..., Any]:
    """Return PyTorch's function. Keys and values may have fewer heads than queries."""
    from torch.nn.attention.varlen import varlen_attn  # its operators take a while to define

    has_option = "enable_gqa" in inspect.signature(varlen_attn).parameters  # PyTorch 2.11 shares heads without it
    return partial(varlen_attn, enable_gqa=True) if has_option else varlen_attn


def load_functions(implementation: str | None, *args: Any, **options: Any) -> tuple[Callable[..., Any] | None, ...]:
    """Return the functions that Transformers calls for a kind of flash attention: PyTorch's, or those of a package.

    They are: for a batch, for rows end to end, for paged caches, to put padding back, and to take it away.
    """
    if implementation != NAME:
        return load_package(implementation, *args, **options)
    padding = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
    return attend_sequences, attend_rows, None, *padding


# Transformers looks for flash attention in packages and on the Hub alone, and has no register of its functions.
load_package = modeling_flash_attention_utils._lazy_imports
modeling_flash_attention_utils._lazy_imports = load_functions
AttentionInterface.register(NAME, flash_attention_forward)
AttentionMaskInterface.register(NAME, masking_utils.flash_attention_mask)
