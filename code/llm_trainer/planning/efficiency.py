# SPDX-License-Identifier: Apache-2.0
"""The shares of their peaks that GPUs reach, each with its source (efficiency.json), and what jobs have shown since."""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's peaks that a training reaches.

    A step takes from `low` to `high` times the seconds that follow from them.
    """

    products: float  # of its operations a second, in products of matrices
    attention: float  # of the same, in attention, whose operations `flops` counts in full
    bandwidth: float  # of its memory's bytes a second
    float8: float  # how many times as fast a product in float8 is
    low: float
    high: float
    source: str


def find_efficiency(gpu: str) -> Efficiency:
    """Return what a GPU of gpus.json reaches, and the CPU under that name; else what a GPU that is not known might."""
    table = read_table()
    return Efficiency(**table["gpus"].get(gpu, table["other"]))


@functools.cache
def read_table() -> dict[str, Any]:
    """Return what efficiency.json holds."""
    return json.loads((files("llm_trainer.planning") / "efficiency.json").read_text(encoding="utf-8"))
