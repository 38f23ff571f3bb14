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

    products: float  # of its operations a second in the type of the product, float8 included
    attention: float  # of the same, in attention of long rows, without what a causal mask hides
    bandwidth: float  # of its memory's bytes a second
    low: float
    high: float
    source: str


@dataclass(frozen=True)
class Host:
    """Seconds that a CPU takes to keep a GPU busy, or itself. Others take from `low` to `high` times as long."""

    launch_seconds: float  # of an operation that a pass starts
    function_seconds: float  # of an autograd function in Python, with the modules around it
    between_seconds: float  # from the end of a step to the next forward pass: update, logging, next batch
    low: float
    high: float
    source: str


def find_efficiency(gpu: str) -> Efficiency:
    """Return what a GPU of gpus.json reaches, and the CPU under that name; else what a GPU that is not known might."""
    table = read_table()
    return Efficiency(**table["gpus"].get(gpu, table["other"]))


@functools.cache
def read_host(of_gpus: bool) -> Host:
    """Return what a host of GPUs takes, or a CPU that trains."""
    return Host(**read_table()["host" if of_gpus else "cpu_host"])


@functools.cache
def read_table() -> dict[str, Any]:
    """Return what efficiency.json holds."""
    return json.loads((files("llm_trainer.planning") / "efficiency.json").read_text(encoding="utf-8"))
