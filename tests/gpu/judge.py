# SPDX-License-Identifier: Apache-2.0
"""The verdict on whole jobs: what each must have done, and how near two of them must come to each other."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from whole_jobs import NUM_STEPS, WholeJob

MAX_DEVIATION = 0.05  # of the estimated peak from the measured one
# bfloat16 keeps 8 bits: a number is off by up to 1/512 of it. The first step's loss is a mean over a thousand tokens of
# the same weights. Later the weights differ too, by the rounding of all steps before.
FIRST_STEP, LATER_STEPS = 2**-9, 2**-6
# Products in float8 keep an error of 4 % each. The loss of the first step is the same but for the square of what they
# do to the logits; a gradient that points 20 degrees aside learns as fast within a tenth.
COARSE_FIRST_STEP, COARSE_LATER_STEPS = 0.01, 0.1
# Lines with these words warn of nothing that a job on the kit's machine could mend.
EXPECTED = (
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes looks for a kernel that is not needed
    "did not run forward before backward",  # TRL's loss multiplies by the head itself; torch 2.13 says nothing of it
)
GPU_SERIES = ("utilization_percent", "memory_used_bytes", "power_watts", "sm_clock_mhz", "tensor_activity_percent")
Verdicts = Iterator[tuple[str, bool, str]]


def judge_job(job: WholeJob, result: dict[str, Any], on_gpu: bool) -> Verdicts:
    """Yield each demand on a job: its name, whether it is met, and what was found."""
    losses = list(result["losses"].values())
    yield "exit", result["exit"] == 0, str(result["exit"])
    if job.stop_at:
        yield from judge_stop(result)
    learned = bool(losses) and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    yield "learns", learned and len(losses) == NUM_STEPS, f"{len(losses)} steps"
    export = result["export"] or {}
    yield (
        "proof",
        bool(export.get("proven")),
        str(export.get("reason") or [c["loaded"] for c in export.get("checks", ())]),
    )
    if job.ways == "cpu-proof":
        places = [check["loaded"] for check in export.get("checks", ())]
        yield "proof on the CPU", places == ["whole on the CPU"], str(places)
    if "sample_prompts" in job.settings:
        yield "answers", result["answers"] > 0, f"{result['answers']} records"
    warnings = [line for line in result["warnings"] if not any(words in line for words in EXPECTED)]
    yield "no warnings", not warnings, " | ".join(warnings[:3])
    if on_gpu:
        yield from judge_on_gpu(job, result)


def judge_stop(result: dict[str, Any]) -> Verdicts:
    """Yield the demands on a job that was stopped in the middle and started again."""
    stop = result["stop"]
    yield "stop", stop["exit"] == 0 and 0 < len(stop["losses"]) < NUM_STEPS, f"after {len(stop['losses'])} steps"
    resumes = [line for line in result["chosen"] if line.startswith("Resuming from")]
    yield "resumes", bool(resumes), "".join(resumes)


def judge_on_gpu(job: WholeJob, result: dict[str, Any]) -> Verdicts:
    """Yield what only a GPU shows: kernels, the estimate beside the peak, the GPU's series, the speed."""
    chosen = "\n".join(result["chosen"])
    kernel = job.settings.get("attn_implementation", "flash_attention_2")
    yield "kernel", f"Attention: {kernel}" in chosen, kernel
    if "base_compute" in job.settings:
        yield "float8", "linear layers multiply in float8" in chosen, ""
    with_liger = "use_liger_kernel" not in job.settings
    yield "Liger", ("Liger kernels: on" in chosen) == with_liger, str(with_liger)
    deviation = find_deviation(result)
    yield "estimate", deviation is not None and abs(deviation) <= MAX_DEVIATION, f"{deviation or math.nan:+.1%}"
    missing = [name for name in GPU_SERIES if not result["gpu_series"].get(name)]
    yield "GPU series", not missing, f"missing: {missing}"
    yield "MFU", bool(result["mfu"]), str(result["mfu"])


def find_deviation(result: dict[str, Any]) -> float | None:
    """Return how far the estimated peak is from the measured one, as a share of that."""
    memory = result["memory"] or {}
    measured, estimate = memory.get("measured_peak_bytes"), memory.get("estimate")
    return estimate["peak_bytes"] / measured - 1 if measured and estimate else None


def judge_likeness(job: WholeJob, result: dict[str, Any], other: dict[str, Any]) -> Verdicts:
    """Yield whether two jobs had the same losses, and ended with the same weights where these have to be equal."""
    exactly = job.like == "exact"
    first, later = (COARSE_FIRST_STEP, COARSE_LATER_STEPS) if job.is_coarse else (FIRST_STEP, LATER_STEPS)
    distances = [
        abs(loss / other["losses"][step] - 1) for step, loss in result["losses"].items() if step in other["losses"]
    ]
    found = f"first {distances[0]:.1e}, at most {max(distances):.1e}" if distances else "no losses"
    near = bool(distances) and distances[0] <= first and max(distances) <= later
    yield "losses alike", near and (not exactly or max(distances) == 0), found
    if exactly:
        distance = measure_weights(Path(result["folder"]), Path(other["folder"]))
        yield "weights alike", distance == 0, f"{distance:.1e}"


def measure_weights(folder: Path, other: Path) -> float:
    """Return the largest difference of two trained adapters' numbers; infinity where one is missing."""
    files = [place / "model/adapter_model.safetensors" for place in (folder, other)]
    if not all(file.is_file() for file in files):
        return math.inf
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    return max((tensor.float() - theirs[name].float()).abs().max().item() for name, tensor in ours.items())


def describe_machine() -> dict[str, Any]:
    """Return the GPU's name, or that there is none, and the versions that count."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "memory_bytes": torch.cuda.mem_get_info()[1] if has_gpu else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
