# SPDX-License-Identifier: Apache-2.0
"""How fast one GPU fine-tunes a Llama-shaped model of random weights, as a share of what its matrix products allow.

    python3 bench/gpu.py            1B and 8B, bf16 LoRA and nf4 QLoRA: a row of a table each
    python3 bench/gpu.py 8B lora    one of them
    python3 bench/gpu.py --tiny     seconds on a CPU, to try the program itself

Needs torch, transformers and peft; bitsandbytes for nf4. No files, no network, none of this project's modules.

Floating-point operations of the model, not of the machine: what gradient checkpointing computes again does not count.
A token costs 2 a weight of the matrices in the forward pass, 2 for the gradients of activations and 2 for those of
weights, which a frozen matrix does not need: 4 N of a LoRA's base, 6 n of the adapter itself. Embeddings are looked up
and not multiplied. Attention is 12 times layers x width of all heads x tokens a token (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), halved, as half of what is causal is masked, and of a row's own tokens.
"""

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

VOCABULARY = 128_256
SIZES = {
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    # Llama-3.2-1B and Llama-3.1-8B
    "1B": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072,
    ),
}  # fmt: skip
METHODS = ("lora", "qlora")
MATRIX = 8192  # rows and columns of the product that sets the ceiling
WARM_UP_STEPS, STEPS = 3, 8
PHASES = ("forward", "backward", "optimizer")
LORA_RANK = 16
COLUMNS = (
    *("model", "step", "attention", "tokens/s", "model TFLOP/s", "of the ceiling", "peak GiB"),
    "ms: " + " + ".join(PHASES),
)
Loss = Callable[[PeftModel, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """One measurement."""

    size: str
    method: str  # lora: bf16; qlora: the base in nf4
    sequences: int = 1  # a step
    tokens: int = 4096  # a sequence; those of all rows together
    rows: int = 4  # that share a sequence, of the same length
    checkpointing: bool = True
    attention: str = "sdpa"


@dataclass
class Measurement:
    """Medians over the steps."""

    plan: Plan
    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)  # forward, backward, optimizer
    peak_bytes: int = 0
    tokens_per_second: float = 0.0
    flops_per_second: float = 0.0  # of the model


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(plan: Plan, device: torch.device) -> PreTrainedModel:
    """A base of random weights: bf16 on a GPU and float32 on a CPU, the linear layers in nf4 for qlora."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SIZES[plan.size], dtype=dtype, attn_implementation=plan.attention)
    return quantize(model, dtype) if plan.method == "qlora" else model


def quantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its linear layers but the output layer in nf4, double quantization, as load_in_4bit makes it."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            packed.weight = weight.to(layer.weight.device)  # which quantizes
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
            layer.weight = None
    model.is_loaded_in_4bit = True
    return model


def adapt(model: PreTrainedModel, checkpointing: bool) -> PeftModel:
    """A LoRA on all linear layers, ready to be trained."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def make_batch(plan: Plan, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Sequences that several rows share, their position ids beginning anew with each: [sequences, tokens]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (plan.sequences, plan.tokens), generator=generator)
    row = torch.arange(plan.tokens // plan.rows).repeat(plan.rows)
    labels = tokens.masked_fill(row == 0, -100)  # the first of a row would be predicted from another row
    batch = {"input_ids": tokens, "position_ids": row.expand_as(tokens).contiguous(), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def find_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the next token, in chunks whose logits are computed again in the backward pass."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = model.get_base_model()
    hidden = base.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)  # [tokens, width]
    labels = batch["labels"][:, 1:].flatten()

    def sum_losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(base.lm_head(hidden).float(), labels, reduction="sum")

    sums = [
        torch.utils.checkpoint.checkpoint(sum_losses, part, own, use_reentrant=False)
        for part, own in zip(hidden.split(1024), labels.split(1024), strict=True)
    ]
    return torch.stack(sums).sum() / (labels != -100).sum()


def train(
    plan: Plan, device: torch.device, num_steps: int = STEPS, warm_up: int = WARM_UP_STEPS, find_loss: Loss = find_loss
) -> Measurement:
    """Steps on one batch, which a model has to learn, timed; in autocast, as Transformers' trainer computes."""
    model = adapt(build_model(plan, device), plan.checkpointing)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-3, fused=device.type == "cuda")
    batch = make_batch(plan, SIZES[plan.size].vocab_size, device)
    reset_peak(device)  # what building took is not what training takes
    measurement, steps = Measurement(plan), []
    for _ in range(warm_up + num_steps):
        times = [now(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = find_loss(model, batch)
        times.append(now(device))
        loss.backward()
        times.append(now(device))
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(device))
        steps.append([after - before for before, after in pairwise(times)])
        measurement.losses.append(loss.item())
    timed = steps[warm_up:]
    measurement.step_seconds = statistics.median(map(sum, timed))
    phases = zip(PHASES, zip(*timed, strict=True), strict=True)
    measurement.phase_seconds = {name: statistics.median(times) for name, times in phases}
    measurement.peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    measurement.tokens_per_second = plan.sequences * plan.tokens / measurement.step_seconds
    measurement.flops_per_second = measurement.tokens_per_second * count_flops(model, plan.tokens // plan.rows)
    return measurement


def count_flops(model: PeftModel, row_tokens: int) -> float:
    """Of a token of a row of this length, forward and backward; the module's docstring has the formula."""
    config = model.config
    adapter = sum(w.numel() for name, w in model.named_parameters() if "lora_" in name)
    frozen = sum(
        layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name
    )
    head_size = config.head_dim
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_size * row_tokens / 2
    return 4 * frozen + 6 * adapter + attention


def find_ceiling(device: torch.device, size: int = MATRIX, tries: int = 5) -> float:
    """Operations a second of a matrix product [size, size] x [size, size]: the best of several times ten."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    seconds = []
    for _ in range(tries):
        started = now(device)
        for _ in range(10):
            left @ right
        seconds.append((now(device) - started) / 10)
    return 2 * size**3 / min(seconds)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(plan: Plan, device: torch.device) -> str:
    """The operations that take the device's time in one step."""
    model = adapt(build_model(plan, device), plan.checkpointing)
    batch = make_batch(plan, SIZES[plan.size].vocab_size, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = find_loss(model, batch)
        loss.backward()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        now(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def describe_row(measurement: Measurement, ceiling: float) -> str:
    plan, phases = measurement.plan, measurement.phase_seconds
    cells = [
        f"{plan.size} {plan.method}",
        f"{plan.sequences} x {plan.tokens} of {plan.rows} rows",
        f"{plan.attention}{', checkpointing' * plan.checkpointing}",
        f"{measurement.tokens_per_second:,.0f}",
        f"{measurement.flops_per_second / 1e12:.1f}",
        f"{measurement.flops_per_second / ceiling:.1%}",
        f"{measurement.peak_bytes / 2**30:.1f}",
        f"{1000 * measurement.step_seconds:.0f} = " + " + ".join(f"{1000 * phases[name]:.0f}" for name in PHASES),
    ]
    return f"| {' | '.join(cells)} |"


def describe_device(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def choose_plans(words: list[str], options: dict[str, Any]) -> Iterator[Plan]:
    for size in [word for word in words if word in SIZES] or ["1B", "8B"]:
        for method in [word for word in words if word in METHODS] or METHODS:
            if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
                print(f"{size} {method} left out: bitsandbytes is not installed here")
            else:
                yield Plan(size, method, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", choices=[*SIZES, *METHODS, []], help="sizes and methods; all by default")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, short sequences, a small ceiling")
    parser.add_argument("--profile", action="store_true", help="what takes the time of a step, instead of a row")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations: faster where they fit")
    parser.add_argument("--rows", type=int, default=4, help="that share a sequence")
    parser.add_argument("--sequences", type=int, default=1, help="a step")
    parser.add_argument("--attention", default="sdpa", help="Transformers' name of the kernel")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = choose_device()
    options = {
        "sequences": given.sequences,
        "rows": given.rows,
        "attention": given.attention,
        "checkpointing": not given.no_checkpointing,
        **({"tokens": 64} if given.tiny else {}),
    }
    plans = list(choose_plans([*given.words, *["tiny"] * given.tiny], options))
    if given.profile:
        for plan in plans:
            print(profile(plan, device))
        return
    ceiling = find_ceiling(device, 256 if given.tiny else MATRIX)
    print(f"{describe_device(device)}; ceiling {ceiling / 1e12:.3g} TFLOP/s\n")
    print(
        "| model | step | tokens/s | model TFLOP/s | of the ceiling | peak GiB | ms: forward + backward + optimizer |"
    )
    print("|---|---|---|---|---|---|---|")
    for plan in plans:
        measurement = train(plan, device)
        print(describe_row(measurement, ceiling), flush=True)
        assert measurement.losses[-1] < measurement.losses[0], json.dumps(measurement.losses)


if __name__ == "__main__":
    main()
