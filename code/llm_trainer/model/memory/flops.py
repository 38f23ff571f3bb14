# SPDX-License-Identifier: Apache-2.0
"""How fast a device could train at most: what a token costs, and what GPUs compute; for the model FLOPs utilization.

MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the tokens a second that are trained on over those that the
device's peak would allow. What is computed a second time for the sake of memory does not count.
"""

import re
from collections.abc import Mapping

from transformers import PreTrainedConfig

from llm_trainer.model.device import Device
from llm_trainer.model.memory.shape import ModelShape

# Dense 16-bit tensor FLOPS with float32 sums, of NVIDIA's data sheets; the names are those that CUDA tells.
PEAK_FLOPS = {
    r"Tesla T4": 65e12,
    r"Tesla V100-SXM2-\d+GB": 125e12,
    r"NVIDIA A10G": 70e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA RTX PRO 6000 Blackwell Server Edition": 503.8e12,
    r"NVIDIA A100-SXM4-\d+GB": 312e12,
    r"NVIDIA H100 80GB HBM3": 989.4e12,
    r"NVIDIA H200": 989.4e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA B300.*": 2250e12,
    r"NVIDIA GB200": 2500e12,
}
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # as configs name it


def find_peak_tokens_per_second(
    shape: ModelShape | None, config: PreTrainedConfig, device: Device, row_tokens: float
) -> float | None:
    """Tokens a second at which the device would compute at its peak; None where the model or the device is unknown."""
    peak = find_peak_flops(device)
    needed = count_flops(shape, config, row_tokens) if shape and peak else None
    return peak / needed if peak and needed else None


def find_peak_flops(device: Device) -> float | None:
    """A second, in 16 bit; None for a device that is not in the table, such as a CPU or a part of a GPU."""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.fullmatch(name, device.name)), None)


def measure_row_tokens(lengths: Mapping[int, int], max_length: int | None) -> float:
    """Tokens of the row that a token stands in, on average over the tokens; `lengths` counts rows of each length."""
    cut = [(min(length, max_length or length), rows) for length, rows in lengths.items()]
    return sum(rows * length**2 for length, rows in cut) / max(1, sum(rows * length for length, rows in cut))


def count_flops(shape: ModelShape, config: PreTrainedConfig, row_tokens: float) -> float | None:
    """Floating-point operations that training takes a token, forward and backward, in a row of so many tokens.

    A weight that is multiplied with takes two in the forward pass, two for the gradient of its input, and two for its
    own gradient: 6 where it is trained, 4 where it is frozen below an adapter. Looked-up embeddings take none; of
    experts those count that a token goes to. None where a mixture's config does not tell how many these are.
    """
    text_config = config.get_text_config()
    experts_share = find_experts_share(text_config)
    if shape.count_weights("experts") and experts_share is None:
        return None
    total = 0.0
    for part in shape.parts:
        if part.role != "embeddings":
            active = part.num_weights * (experts_share or 1.0 if part.role == "experts" else 1.0)
            total += active * (6 if part.trained_bytes else 4)
    if not shape.count_weights("output"):  # the embeddings are the output's weights, too
        table = max((part for part in shape.parts if part.role == "embeddings"), key=lambda part: part.num_weights)
        total += table.num_weights * (6 if table.trained_bytes else 4)
    return total + count_attention(text_config, row_tokens)


def count_attention(config: PreTrainedConfig, row_tokens: float) -> float:
    """12 a layer, head, number of a head and token of the row, as in the paper: not halved for what a mask hides.

    Layers that see a window count that, and layers without attention nothing.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = {
        "full_attention": row_tokens,
        "sliding_attention": min(row_tokens, getattr(config, "sliding_window", None) or row_tokens),
        "chunked_attention": min(row_tokens, getattr(config, "attention_chunk_size", None) or row_tokens),
    }
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 12 * config.num_attention_heads * width * sum(seen.get(layer, 0.0) for layer in layers)


def find_experts_share(config: PreTrainedConfig) -> float | None:
    """The share of its experts that each token goes to."""
    total = next((number for name in NUM_EXPERTS if (number := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / total if chosen and total else None
