# SPDX-License-Identifier: Apache-2.0
"""What a training run of any program with Transformers' Trainer tells about its steps."""

import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, trainer

WARM_UP_STEPS = 6
PACKAGES = ("torch", "transformers", "trl", "unsloth")


class StepClock(TrainerCallback):
    """Seconds and tokens of each step, once the device has done it, and the losses that are logged.

    What was found is written to the file and the process ends at the last step: what a program does after it is not
    measured here.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.times, self.tokens = file, [0.0], [0]
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(self.count_tokens)
        self.times = [read_clock()]

    def count_tokens(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.tokens[-1] += inputs[0].numel()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(read_clock())
        self.tokens.append(0)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        seconds = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        found = {
            "step_seconds": statistics.median(seconds[WARM_UP_STEPS:]),
            "seconds": seconds,
            "tokens": self.tokens[:-1],
            "losses": self.losses,
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": {name: version(name) for name in PACKAGES if name in sys.modules},
        }
        partial = self.file.with_suffix(".part")
        partial.write_text(json.dumps(found))
        partial.replace(self.file)
        os._exit(0)


def read_clock() -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch_every_trainer(file: Path) -> None:
    """Have each Trainer of this process call a clock."""
    trainer.DEFAULT_CALLBACKS.append(StepClock(file))
