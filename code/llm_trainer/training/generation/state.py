# SPDX-License-Identifier: Apache-2.0
"""State that a trainer of completions keeps between steps, in a checkpoint: a file for each rank."""

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FILE = "generation_{rank}.pt"


def save_states(own: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the state of every rank into a folder of rank 0. Every rank must call this."""
    stream = io.BytesIO()
    torch.save(own, stream)
    states: list[Any] | None = [stream.getvalue()]
    if group is not None:
        states = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(stream.getvalue(), states, group=group)
    for rank, state in enumerate(states or ()):
        (folder / FILE.format(rank=rank)).write_bytes(state)


def load_state(folder: Path, rank: int, device: torch.device) -> dict[str, Any] | None:
    """Return the state of a rank, None where the checkpoint has none."""
    file = folder / FILE.format(rank=rank)
    return torch.load(file, map_location=device, weights_only=True) if file.is_file() else None
