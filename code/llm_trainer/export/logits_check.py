# SPDX-License-Identifier: Apache-2.0
"""The proof that a written model computes what was trained: both give their logits on a few training rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.units import show_bytes
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.data.images.shown import list_pictures
from llm_trainer.job.failure_reasons import is_shortage
from llm_trainer.model.device import Device, find_free_memory

CHECKED_ROWS, CHECKED_TOKENS = 3, 128
SEARCHED_ROWS = 100  # for some with images
NO_INPUTS = ("labels", "num_tokens")  # parts of a batch that say nothing to a model
# Largest difference of logits that rounding explains, relative to the largest logit.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CheckRow = list[int] | dict[str, torch.Tensor]  # its tokens; with an image, what a model reads of it
ROOM = 1.2  # memory that loading and the logits take, as a multiple of the weights' size


class ResultDiffersError(UserError):
    """Written files that are not what was trained. Whatever else ends a check says nothing against the result."""


@dataclass(frozen=True)
class CheckPlace:
    """The place where a model is loaded for the check."""

    device: torch.device
    words: str
    placement: dict[str, Any] = field(default_factory=dict)  # Transformers' options for several places


def choose_check_rows(sample: Dataset, collator: ImageCollator | None = None) -> list[CheckRow]:
    """Return the first tokens of a few training rows, and of pairs those of the chosen answers.

    `collator` is there where rows have images. Those that have some come first, each with its first image and what
    follows. Their number is fixed: ranks that hold shards must compute equally often.
    """
    if collator is not None:
        searched = sorted(sample.take(min(len(sample), SEARCHED_ROWS)), key=lambda row: not row["pictures"])
        return list(islice(cycle(build_row(row, collator) for row in searched[:CHECKED_ROWS]), CHECKED_ROWS))
    rows = sample[:CHECKED_ROWS]
    ends = [lengths[0] for lengths in rows["seq_lengths"]] if "seq_lengths" in rows else [CHECKED_TOKENS] * CHECKED_ROWS
    first = [row[: min(end, CHECKED_TOKENS)] for row, end in zip(rows["input_ids"], ends, strict=False)]
    return list(islice(cycle(first), CHECKED_ROWS))


def build_row(row: dict[str, Any], collator: ImageCollator) -> CheckRow:
    """Return what a model reads of a row and of its first image, or of all where they depend on each other."""
    batch = collator([cut_behind_image(row, collator.images.placeholders.is_joined)])
    return {name: value for name, value in batch.items() if name not in NO_INPUTS}


def cut_behind_image(row: dict[str, Any], is_joined: bool = False) -> dict[str, Any]:
    """Return a row's beginning: its first image with the tokens that follow, but no part of a second one.

    Of a pair the chosen answer is taken. `is_joined` keeps all images, since one alone would have other tokens.
    """
    length = row["seq_lengths"][0] if "seq_lengths" in row else len(row["input_ids"])
    pictures = list_pictures(row)
    kept = pictures if is_joined else pictures[:1]
    end = CHECKED_TOKENS + (kept[-1]["start"] + kept[-1]["tokens"] if kept else 0)
    end = min([end, length, *(placed["start"] for placed in pictures[len(kept) :])])
    return {"input_ids": row["input_ids"][:end], "labels": row["labels"][:end], "pictures": kept}


@torch.no_grad()
def compute_logits(model: torch.nn.Module, rows: Sequence[CheckRow], device: torch.device) -> list[torch.Tensor]:
    """Return the logits of each row's last tokens, (tokens, vocabulary) in float32 on the CPU.

    Every rank that holds shards must call this.
    """
    model.eval()  # without dropout
    outputs = (model(**build_inputs(row, model.dtype, device), use_cache=False) for row in rows)
    return [output.logits[0, -CHECKED_TOKENS:].float().cpu() for output in outputs]


def build_inputs(row: CheckRow, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Return what a model reads of a row, on a device. Pixels get the type of the model's weights."""
    inputs = row if isinstance(row, dict) else {"input_ids": torch.tensor([row])}
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def count_tokens(row: CheckRow) -> int:
    """Return the tokens of a row."""
    return row["input_ids"].numel() if isinstance(row, dict) else len(row)


def attempt_logits(
    model: torch.nn.Module, rows: Sequence[CheckRow], device: torch.device
) -> tuple[list[torch.Tensor] | None, str | None]:
    """Return the logits of a trained model that one rank holds whole, and None; or None, and why there are none.

    A trained model is worth more than its proof, which takes memory beside the optimizer's.
    """
    try:
        return compute_logits(model, rows, device), None
    except Exception as error:
        reason = explain_failed_check("the trained model's logits", error)
    log.warning(f"The result will be in place, and not proven: {reason}.")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, reason


def explain_failed_check(what: str, error: Exception) -> str:
    """Return why a part of the check came to no end, as a reason for the manifest."""
    if is_shortage(error):
        return f"there was no room for {what} ({quote_error(error)})"
    return f"{what} could not be computed ({type(error).__name__}: {quote_error(error)})"


def measure_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Return the largest difference of two logits, relative to the largest expected logit."""
    largest = max(logits.abs().max().item() for logits in expected)
    return max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True)) / largest


def choose_place(weights_bytes: int, device: Device, scratch_dir: Path) -> CheckPlace:
    """Return the first place that holds the weights: the device, the host's memory, or both and the disk by layers."""
    free_bytes = {place: find_free_memory(place) for place in dict.fromkeys((device, Device(torch.device("cpu"))))}
    for place, free in free_bytes.items():
        if ROOM * weights_bytes <= free:
            return CheckPlace(place.torch, f"whole on {place.name}")
    limits = {place.torch.index if place.is_gpu else "cpu": int(free / ROOM) for place, free in free_bytes.items()}
    placement = {"device_map": "auto", "max_memory": limits, "offload_folder": str(scratch_dir / "offloaded")}
    return CheckPlace(device.torch, f"layer by layer on {device.name}", placement)


@dataclass(frozen=True, eq=False)
class Expectation:
    """The logits that a written model has to compute on some rows."""

    rows: Sequence[CheckRow]
    logits: list[torch.Tensor]
    tolerance: float | None  # relative to the largest logit


def compare_logits(
    what: str, expected: Expectation, model: PreTrainedModel | PeftModel, place: CheckPlace
) -> dict[str, Any]:
    """Compare a model that was written and loaded again with the expected logits. Return the record for the manifest.

    Raises ResultDiffersError where the difference exceeds the tolerance, or is not-a-number. Without a tolerance only
    not-a-number is refused.
    """
    if not all(logits.isfinite().all() for logits in expected.logits):
        raise ResultDiffersError("The trained model computes not-a-number: the training diverged; lower learning_rate.")
    difference = measure_difference(expected.logits, compute_logits(model, expected.rows, place.device))
    tolerance, rows = expected.tolerance, expected.rows
    if not difference <= (math.inf if tolerance is None else tolerance):  # not-a-number fails too
        limit = "" if tolerance is None else f", and rounding explains {tolerance:.0e}"
        raise ResultDiffersError(
            f"{what} does not compute what was trained: logits differ by {difference:.2e} of the largest{limit}."
        )
    return {
        "what": what,
        "loaded": place.words,
        "rows": len(rows),
        "tokens": sum(map(count_tokens, rows)),
        "relative_logit_difference": difference,
        "tolerance": tolerance,
    }


def describe_unproven(what: str, weights_bytes: int) -> dict[str, Any]:
    """Return the record for a check that cannot run, since no memory holds the base.

    PEFT cannot put an adapter on a base that lies on the disk.
    """
    log.info(
        f"{what} is not compared with the trained model: no memory here holds {show_bytes(weights_bytes)} of weights"
    )
    return {"what": what, "loaded": "not at all: the base is larger than the memory", "rows": 0}
