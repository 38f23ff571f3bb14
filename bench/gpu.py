# SPDX-License-Identifier: Apache-2.0
"""How fast one GPU fine-tunes a Llama-shaped model of random weights, as a share of what its matrix products allow.

    python3 bench/gpu.py                  8B: each variant below, a row of a table each
    python3 bench/gpu.py "nf4" "fp8"      some of them
    python3 bench/gpu.py --size tiny      seconds on a CPU, to try the program itself

Needs torch, transformers, trl and peft, and this project's code on PYTHONPATH for Liger; bitsandbytes for nf4,
flash_attn for FA2. No files and no network. Each variant is a process of its own; --out keeps all figures as JSON,
and with --profile which kernels take a step's time.

Floating-point operations of the model, not of the machine: what gradient checkpointing computes again does not count.
A token costs 2 a weight of the matrices in the forward pass, 2 for the gradients of activations and 2 for those of
weights, which a frozen matrix does not need: 4 N of a LoRA's base, 6 n of the adapter itself. Embeddings are looked up
and not multiplied. Attention is 12 times layers x width of all heads x tokens a token (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), halved, as half of what is causal is masked, and of a row's own tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from llm_trainer.model.layers import torch_flash
from llm_trainer.model.layers.float8 import convert_base

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
WARM_UP_STEPS, STEPS = 3, 6
PHASES = ("forward", "backward", "optimizer")
LORA_RANK = 16
CHILD_SECONDS = 150  # a variant's limit
COLUMNS = (
    *("variant", "tokens/s", "model TFLOP/s", "of the ceiling", "peak GiB", "retries"),
    "ms: " + " + ".join(PHASES),
)


@dataclass(frozen=True)
class Plan:
    """One measurement."""

    size: str
    method: str  # lora: bf16; qlora: the base in nf4; fp8: its products in float8
    sequences: int = 1  # a step
    tokens: int = 4096  # a sequence; those of all rows together
    rows: int = 4  # that share a sequence, of the same length
    checkpointing: bool = True
    attention: str = "sdpa"
    liger: bool = False
    dropout: float = 0.0
    casts_inputs: bool = False  # of adapters to float32, as PEFT does if it is left to itself
    fused: bool = False  # adapters add to their base's product, in one autograd function
    compiled: bool = False  # each decoder layer by torch.compile


# What one variant changes of the one that all are measured against, the last of the first four.
FAST = {"sequences": 2, "attention": "flash_attention_2", "liger": True, "checkpointing": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "first release": {"checkpointing": True, "dropout": 0.1, "casts_inputs": True},
    "dropout 0": {"checkpointing": True, "casts_inputs": True},
    "dropout 0, no cast": {"checkpointing": True},
    "no recomputation": {},
    "fused adapters": {"fused": True},
    "compiled layers": {"compiled": True, "liger": False},
    "compiled, fused": {"compiled": True, "liger": False, "fused": True},
    "no Liger": {"liger": False},
    "sdpa": {"attention": "sdpa"},
    "torch's flash": {"attention": torch_flash.NAME},
    "nf4": {"method": "qlora"},
    "nf4, fused": {"method": "qlora", "fused": True},
    "fp8": {"method": "fp8"},
    "fp8, fused": {"method": "fp8", "fused": True},
}


@dataclass
class Measurement:
    """Medians over the steps."""

    plan: Plan
    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)  # forward, backward, optimizer
    peak_bytes: int = 0
    allocator_retries: int = 0
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
    if plan.liger:
        from llm_trainer.model.liger import apply_liger

        apply_liger(model, {})
    if plan.method == "qlora":
        for name in list_base_layers(model):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantize_to_nf4(model.get_submodule(name)))
    model.is_loaded_in_4bit = plan.method == "qlora"
    return model


def list_base_layers(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers but the output layer."""
    output = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not output]


def quantize_to_nf4(layer: nn.Linear) -> nn.Linear:
    """The layer in nf4, double quantization, as load_in_4bit makes it."""
    import bitsandbytes as bnb

    kind = {"compute_dtype": layer.weight.dtype, "quant_type": "nf4"}
    packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta", **kind)
    weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    packed.weight = weight.to(layer.weight.device)  # which quantizes
    return packed


def adapt(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """A LoRA on all linear layers, ready to be trained."""
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=plan.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    base_layers = list_base_layers(model)
    adapted = get_peft_model(model, lora).train()
    if plan.method == "fp8":
        convert_base(adapted, base_layers)
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = plan.casts_inputs
    if plan.fused:
        from llm_trainer.model.layers.fused_adapters import fuse_adapters

        fuse_adapters(adapted)
    if plan.compiled:
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=False)
    return adapted


def make_batch(plan: Plan, vocabulary: int, device: torch.device) -> dict[str, Any]:
    """Sequences that several rows share, their position ids beginning anew with each: [sequences, tokens].

    For flash attention all rows lie in one sequence, and it is told where each begins, as TRL's collator does.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (plan.sequences, plan.tokens), generator=generator)
    length = plan.tokens // plan.rows
    row = torch.arange(length).repeat(plan.rows).expand_as(tokens)
    labels = tokens.masked_fill(row == 0, -100)  # the first of a row would be predicted from another row
    batch = {"input_ids": tokens, "position_ids": row.contiguous(), "labels": labels}
    bounds: dict[str, Any] = {}
    if plan.attention.startswith("flash"):
        batch = {name: value.reshape(1, -1) for name, value in batch.items()}
        starts = torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32, device=device)
        bounds = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": length, "max_length_k": length}
    return {**{name: value.to(device) for name, value in batch.items()}, **bounds}


def find_loss(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    """TRL's mean of the labelled tokens' losses, whose head never holds all logits."""
    labels = batch["labels"]
    return -model(**batch, fused_lm_head=True).log_probs.sum() / (labels[:, 1:] != -100).sum()


def train(plan: Plan, device: torch.device, num_steps: int = STEPS, warm_up: int = WARM_UP_STEPS) -> Measurement:
    """Steps on one batch, which a model has to learn, timed; in autocast, as Transformers' trainer computes."""
    model = adapt(build_model(plan, device), plan)
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
    fill_medians(measurement, steps[warm_up:], model)
    return measurement


def fill_medians(measurement: Measurement, steps: list[list[float]], model: PeftModel) -> None:
    """Put the medians of the steps' phases, in seconds, and what follows from them into the measurement."""
    plan = measurement.plan
    phases = zip(PHASES, zip(*steps, strict=True), strict=True)
    measurement.step_seconds = statistics.median(map(sum, steps))
    measurement.phase_seconds = {name: statistics.median(times) for name, times in phases}
    if torch.cuda.is_available():
        measurement.peak_bytes = torch.cuda.max_memory_allocated()
        measurement.allocator_retries = torch.cuda.memory_stats()["num_alloc_retries"]
    measurement.tokens_per_second = plan.sequences * plan.tokens / measurement.step_seconds
    measurement.flops_per_second = measurement.tokens_per_second * count_flops(model, plan.tokens // plan.rows)


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
    model = adapt(build_model(plan, device), plan)
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
    return recorded.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)


def describe_row(name: str, measurement: Measurement, ceiling: float) -> str:
    phases = measurement.phase_seconds
    cells = [
        name,
        f"{measurement.tokens_per_second:,.0f}",
        f"{measurement.flops_per_second / 1e12:.1f}",
        f"{measurement.flops_per_second / ceiling:.1%}",
        f"{measurement.peak_bytes / 2**30:.1f}",
        f"{measurement.allocator_retries}",
        f"{1000 * measurement.step_seconds:.0f} = " + " + ".join(f"{1000 * phases[name]:.0f}" for name in PHASES),
    ]
    return f"| {' | '.join(cells)} |"


def describe_device(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def make_plan(size: str, variant: str) -> Plan:
    """The plan of a variant. A CPU has neither flash attention nor Liger, and the tiny model short sequences."""
    plan = Plan(size, **{"method": "lora", **FAST, **VARIANTS[variant]})
    if not torch.cuda.is_available():
        plan = replace(plan, attention="sdpa", liger=False)
    return replace(plan, tokens=64) if size == "tiny" else plan


def measure_variant(plan: Plan, profiles: bool) -> dict[str, Any]:
    """The figures of a variant, and the table of its kernels."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = choose_device()
    measurement = train(plan, device)
    if not measurement.losses[-1] < measurement.losses[0]:
        raise AssertionError(f"it does not learn: {measurement.losses}")
    return {"measurement": asdict(measurement), "profile": profile(plan, device) if profiles else ""}


def start_variant(size: str, variant: str, profiles: bool) -> subprocess.Popen[str]:
    """A process that measures a variant once it is told to, and imports what it needs meanwhile."""
    command = [sys.executable, __file__, "--size", size, "--child", variant, *["--profile"] * profiles]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish_variant(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Have the process measure, and return its figures, or `error`."""
    try:
        printed, errors = process.communicate("go\n", timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"took more than {CHILD_SECONDS} s"}
    return {"error": errors[-3000:]} if process.returncode else json.loads(printed.splitlines()[-1])


def measure_all(size: str, variants: list[str], profiled: list[str], out: Path | None) -> None:
    """Print a row for each variant as it comes. `out` then holds what was measured so far."""
    device = choose_device()
    ceiling = find_ceiling(device, 256 if size == "tiny" else MATRIX)
    reset_peak(device)
    print(f"{size}, {describe_device(device)}; ceiling {ceiling / 1e12:.3g} TFLOP/s\n")
    print(f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), sep="\n", flush=True)
    figures: dict[str, Any] = {"size": size, "device": describe_device(device), "ceiling": ceiling, "variants": {}}
    processes = (start_variant(size, variant, variant in profiled) for variant in variants)
    following = next(processes)
    for variant in variants:
        process, following = following, next(processes, None)  # which imports while this one measures
        found = figures["variants"][variant] = finish_variant(process)
        print(describe_result(variant, found, ceiling), flush=True)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / "fast.json").write_text(json.dumps(figures, indent=1))


def describe_result(variant: str, found: dict[str, Any], ceiling: float) -> str:
    """A row of the table, or why there is none."""
    if "error" in found:
        return f"{variant} failed: {found['error'][-600:]}"
    measured = found["measurement"]
    return describe_row(variant, Measurement(**{**measured, "plan": Plan(**measured["plan"])}), ceiling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"all by default: {', '.join(VARIANTS)}")
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument(
        "--profile", action="append", default=[], nargs="?", const="*", help="variants whose kernels to list"
    )
    parser.add_argument("--out", type=Path, help="a folder for the figures as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sys.stdin.readline()
        print(json.dumps(measure_variant(make_plan(given.size, given.child), bool(given.profile))))
    else:
        measure_all(given.size, given.variants or list(VARIANTS), given.profile, given.out)


if __name__ == "__main__":
    main()
