# SPDX-License-Identifier: Apache-2.0
"""A tiny gpt-oss whose experts are stored in MXFP4, as the real checkpoints are: blocks and scales of uint8."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

from support.tiny_model import build_tokenizer

GROUP = 32  # numbers that share a scale
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # of E2M1, by its three lower bits
LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2**2
BIAS = 127  # of E8M0
EXPERTS = ("gate_up_proj", "down_proj")


def build_tiny_gpt_oss(folder: Path) -> Path:
    """Write the model to the folder as openai/gpt-oss-20b lies on disk."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="bfloat16",
    )
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(EXPERTS):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize(tensor.float().transpose(1, 2))
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., groups, 16], two numbers a byte, the first in its lower half, and scales [..., groups].

    As the OCP Microscaling Formats specification 1.0 says, section 6.3: the scale is the largest power of two in a
    group over that of the element type; what is then too large is cut.
    """
    groups = weights.unflatten(-1, (-1, GROUP))
    exponents = groups.abs().amax(-1).log2().floor() - LARGEST_EXPONENT
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - MAGNITUDES).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low + 16 * high).to(torch.uint8), (exponents + BIAS).to(torch.uint8)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers [..., groups * 32] of blocks and scales: sign, two bits of exponent and one of mantissa."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    sign = 1 - 2 * (codes >> 3)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    magnitude = torch.where(exponent > 0, (1 + mantissa / 2) * 2.0 ** (exponent - 1), mantissa / 2)
    return (sign * magnitude * 2.0 ** (scales.int() - BIAS)[..., None]).flatten(-2)
