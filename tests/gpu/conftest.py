# SPDX-License-Identifier: Apache-2.0
"""One NVIDIA GPU, or, with LLM_TRAINER_GPU_TEST_SIZE=tiny, a CPU on which tiny models try out the tests themselves.

They need torch and transformers, take models of random weights, no files and no network, and skip with the reason what
needs a package that is not there. `python3 -m pytest -s tests/gpu` shows what they measure.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / name) for name in ("code", "tests", "bench")]
SIZE = os.environ.get("LLM_TRAINER_GPU_TEST_SIZE", "1B")


@pytest.fixture(scope="session")
def size() -> str:
    """Of bench/gpu.py's models: 1B, 8B or tiny."""
    return SIZE


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available() and SIZE != "tiny":
        pytest.skip("no CUDA GPU here; LLM_TRAINER_GPU_TEST_SIZE=tiny tries the tests on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """Free what a test leaves: a model's modules refer to each other, and would count into the next test's peak."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
