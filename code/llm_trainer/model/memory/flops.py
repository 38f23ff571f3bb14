# SPDX-License-Identifier: Apache-2.0
"""The speed that a device could train at most: the operations of a token over the peak of a GPU.

The model FLOPs utilization (MFU) is the trained tokens a second over those that the device's peak would allow.
Operations that are repeated for the sake of memory do not count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

import functools
import math
from collections.abc import Mapping

from transformers import PreTrainedConfig

from llm_trainer.model.device import Device
from llm_trainer.model.memory.gpus import find_gpu
from llm_trainer.model.memory.scenario import MemoryScenario, ParallelismPlan
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError, list_layer_configs, read_heads
from llm_trainer.model.memory.tower_trace import trace_tower

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # configs differ in the name
PLAIN = ParallelismPlan(sharded=False, recompute_activations=False, offload_activations=False)  # which repeats nothing


def find_peak_tokens_per_second(scenario: MemoryScenario, lengths: Mapping[int, int]) -> float | None:
    """Return the tokens a second at the device's peak, or None where the model or the device is not known.

    `lengths` counts the rows of each length in tokens. Rows are cut to `max_length`.
    """
    peak, max_length = find_peak_flops(scenario.target.device), scenario.settings.data.max_length
    if peak is None:
        return None
    try:
        row_tokens, passes = measure_row_tokens(lengths, max_length), scenario.untrained_passes
        needed = count_flops(scenario.shape, scenario.config, row_tokens, passes)
        mean_tokens = count_tokens(lengths, max_length) / max(1, sum(lengths.values()))
        return peak / (needed + count_tower_flops(scenario, mean_tokens)) if needed else None
    except UnknownShapeError:
        return None


def find_peak_flops(device: Device) -> float | None:
    """Return a device's 16-bit operations a second. None: its rating is not known."""
    gpu = find_gpu(device.name)
    return gpu.peak_flops if gpu else None


def count_tokens(lengths: Mapping[int, int], max_length: int | None) -> int:
    """Return the tokens of so many rows of each length, cut to `max_length`."""
    return sum(rows * min(length, max_length or length) for length, rows in lengths.items())


def measure_row_tokens(lengths: Mapping[int, int], max_length: int | None) -> float:
    """Return the length in tokens of the row that a token stands in, on average over all tokens.

    `lengths` counts the rows of each length. Rows are cut to `max_length`.
    """
    cut = [(min(length, max_length or length), rows) for length, rows in lengths.items()]
    return sum(rows * length**2 for length, rows in cut) / max(1, sum(rows * length for length, rows in cut))


def count_tower_flops(scenario: MemoryScenario, mean_tokens: float) -> float:
    """Return the operations of the tower for a token, with the images and tokens of the mean row; 0 without images.

    A frozen tower has a forward pass alone. Passes without gradients see the images, too. Raise UnknownShapeError.
    """
    step = scenario.build_step(PLAIN)
    tower = trace_tower(scenario.shape, step, accumulates=False)
    if tower is None or step.images is None:
        return 0.0
    flops = (1 + scenario.untrained_passes) * tower.flops + tower.backward_flops
    return step.images.mean_share * flops / step.num_sequences / max(1, mean_tokens)


def count_flops(
    shape: ModelShape, config: PreTrainedConfig, row_tokens: float, untrained_passes: float = 0
) -> float | None:
    """Return the floating-point operations of a token, forward and backward, in a row of so many tokens.

    A weight of a matrix product takes two operations in the forward pass. The gradient of its input takes two, and its
    own gradient two more. That is 6 where it is trained, and 4 where it is frozen below an adapter. Embeddings are
    looked up and take none. Each pass without gradients, such as a reference makes, takes two more. Only those
    experts count that a token goes to. None comes back where the config does not tell how many these are.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    again = 2 * untrained_passes
    products = count_products(shape, config, for_frozen=4 + again, for_trained=6 + again)
    passes = 1 + untrained_passes / 3  # attention's backward pass takes two thirds of its operations
    return None if products is None else products + passes * count_attention(config.get_text_config(), row_tokens)


def count_products(shape: ModelShape, config: PreTrainedConfig, for_frozen: float, for_trained: float) -> float | None:
    """Return the operations of a token in products of matrices, for so many a frozen and a trained weight.

    None comes back where the config does not tell how many experts a token goes to.
    """
    experts_share = find_experts_share(config.get_text_config())
    if shape.count_weights("experts") and experts_share is None:
        return None
    return sum_products(shape, experts_share or 1.0, for_frozen, for_trained)


@functools.lru_cache(maxsize=64)
def sum_products(shape: ModelShape, experts_share: float, for_frozen: float, for_trained: float) -> float:
    """Return the same where a token goes to a known share of the experts. `plan` asks for it hundreds of times."""
    total = 0.0
    for part in shape.parts:
        if part.role not in ("embeddings", "tower"):  # which no token of a text goes through
            active = part.num_weights * (experts_share if part.role == "experts" else 1.0)
            total += active * (for_trained if part.trained_bytes else for_frozen)
    if not shape.count_weights("output"):  # the embeddings are the output's weights, too
        total += count_head_products(shape, for_frozen, for_trained)
    return total


def count_head_products(shape: ModelShape, for_frozen: float, for_trained: float) -> float:
    """Return the operations of a token in the output layer, for so many a frozen and a trained weight."""
    role = "output" if shape.count_weights("output") else "embeddings"
    table = max((part for part in shape.parts if part.role == role), key=lambda part: part.num_weights)
    return table.num_weights * (for_trained if table.trained_bytes else for_frozen)


def count_attention(config: PreTrainedConfig, row_tokens: float) -> float:
    """Return the operations of attention for a token: 12 x layers x heads x head size x tokens of the row.

    That is the paper's formula, which is not halved for what a causal mask hides. Layers with a window count the
    window, and layers without attention count nothing.
    """
    seen = {
        "full_attention": row_tokens,
        "sliding_attention": min(row_tokens, getattr(config, "sliding_window", None) or row_tokens),
        "chunked_attention": min(row_tokens, getattr(config, "attention_chunk_size", None) or row_tokens),
    }
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    widths = (math.prod(read_heads(layer)) for layer in list_layer_configs(config))
    return 12 * sum(width * seen.get(kind, 0.0) for width, kind in zip(widths, kinds, strict=False))


def find_experts_share(config: PreTrainedConfig) -> float | None:
    """Return the share of its experts that each token goes to, or None where the config does not tell it."""
    total = next((count for name in NUM_EXPERTS if (count := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / total if chosen and total else None
