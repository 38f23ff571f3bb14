# SPDX-License-Identifier: Apache-2.0
"""The attention kernels that the checks on a GPU compare, and the reason why one cannot run here."""

import importlib.util

import torch

from llm_trainer.model.layers import torch_flash

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
KERNELS = ("eager", "sdpa", "flex_attention", torch_flash.NAME, *PACKAGES)


def find_lack(kernel: str, device: torch.device) -> str | None:
    """Why a kernel cannot run here."""
    if kernel in PACKAGES and importlib.util.find_spec(PACKAGES[kernel]) is None:
        return f"{PACKAGES[kernel]} is not installed here"
    if kernel not in ("eager", "sdpa") and device.type != "cuda":
        return f"{kernel} is meant for a GPU"
    return None
