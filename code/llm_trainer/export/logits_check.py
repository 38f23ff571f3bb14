# SPDX-License-Identifier: Apache-2.0
"""Whether what was written computes what was trained: both are asked for the logits of a few training rows."""

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

from llm_trainer.common.errors import UserError
from llm_trainer.common.findings import show_bytes
from llm_trainer.model.device import Device, find_free_memory

CHECKED_ROWS, CHECKED_TOKENS = 3, 128
# Largest difference of logits that rounding explains, relative to the largest logit.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
ROOM = 1.2  # what loading and the logits take, of the weights' size


@dataclass(frozen=True)
class Place:
    """Where a model is loaded to be asked."""

    device: torch.device
    words: str
    placement: dict[str, Any] = field(default_factory=dict)  # of Transformers, where it is not all on the device


def choose_rows(sample: Dataset) -> list[list[int]]:
    """The beginnings of a few training rows. Their number is fixed, as ranks with shards must ask equally often."""
    return list(islice(cycle([row[:CHECKED_TOKENS] for row in sample[:CHECKED_ROWS]["input_ids"]]), CHECKED_ROWS))


@torch.no_grad()
def compute_logits(model: torch.nn.Module, rows: Sequence[list[int]], device: torch.device) -> list[torch.Tensor]:
    """(tokens, vocabulary) of each row, in float32 on the CPU. Every rank that holds shards must call this."""
    model.eval()  # without dropout
    tokens = [torch.tensor([row], device=device) for row in rows]
    return [model(input_ids=row).logits[0].float().cpu() for row in tokens]


def measure_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    largest = max(logits.abs().max().item() for logits in expected)
    return max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True)) / largest


def choose_place(weights_bytes: int, device: Device, scratch_dir: Path) -> Place:
    """The device, else the host's memory, where the weights fit in; else both and the disk, layer by layer."""
    free_bytes = {place: find_free_memory(place) for place in dict.fromkeys((device, Device(torch.device("cpu"))))}
    for place, free in free_bytes.items():
        if ROOM * weights_bytes <= free:
            return Place(place.torch, f"whole on {place.name}")
    limits = {place.torch.index if place.is_gpu else "cpu": int(free / ROOM) for place, free in free_bytes.items()}
    placement = {"device_map": "auto", "max_memory": limits, "offload_folder": str(scratch_dir / "offloaded")}
    return Place(device.torch, f"layer by layer on {device.name}", placement)


def prove(
    what: str,
    expected: list[torch.Tensor],
    model: PreTrainedModel | PeftModel,
    place: Place,
    rows: Sequence[list[int]],
    tolerance: float | None,
) -> dict[str, Any]:
    """Compare what was written and loaded again: the record of it for the manifest.

    Without a tolerance any difference will do but not-a-number. Raises UserError when there is more than it allows.
    """
    if not all(logits.isfinite().all() for logits in expected):
        raise UserError("The trained model computes not-a-number: the training diverged; lower learning_rate.")
    difference = measure_difference(expected, compute_logits(model, rows, place.device))
    if not difference <= (math.inf if tolerance is None else tolerance):  # not-a-number fails too
        limit = "" if tolerance is None else f", and rounding explains {tolerance:.0e}"
        raise UserError(
            f"{what} does not compute what was trained: logits differ by {difference:.2e} of the largest{limit}."
        )
    return {
        "what": what,
        "loaded": place.words,
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "relative_logit_difference": difference,
        "tolerance": tolerance,
    }


def tell_unproven(what: str, weights_bytes: int) -> dict[str, Any]:
    """The record where no memory holds the base: PEFT cannot put an adapter on one that lies on the disk."""
    print(f"{what} is not compared with the trained model: no memory here holds {show_bytes(weights_bytes)} of weights")
    return {"what": what, "loaded": "not at all: the base is larger than the memory", "rows": 0}
