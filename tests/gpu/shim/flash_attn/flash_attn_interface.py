# SPDX-License-Identifier: Apache-2.0
"""flash-attn's functions where others look for them, and for the binary, before they use flash-attn."""

from flash_attn import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_gpu", "flash_attn_varlen_func"]
flash_attn_gpu = None  # the binary
