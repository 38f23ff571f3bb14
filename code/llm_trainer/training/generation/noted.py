# SPDX-License-Identifier: Apache-2.0
"""Completions of a step with their rewards, as the journal keeps them: a bounded number."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_NOTED = 4  # completions of a step
MAX_CHARACTERS = 1000
STEPS_A_RUN = 200  # whose completions are noted, at most


def is_noted(step: int, num_steps: int) -> bool:
    """Tell whether completions of a step are noted, of all in a run with so many: all of a short run."""
    return step % max(1, num_steps // STEPS_A_RUN) == 0


def describe_completions(logs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return completions that are spread evenly over a batch. `logs` are those that TRL's trainers keep of it."""
    prompts, completions, advantages = ([*logs[name]] for name in ("prompt", "completion", "advantages"))
    rewards = {name: [*values] for name, values in logs["rewards"].items()}
    total = len(completions)
    return [
        {
            "prompt": show_text(prompts[place]),
            "completion": show_text(completions[place]),
            "rewards": {name: hide_nan(values[place]) for name, values in rewards.items()},
            "advantage": round(advantages[place], 4),
        }
        for place in range(0, total, max(1, -(-total // MAX_NOTED)))
    ]


def hide_nan(value: float) -> float | None:
    """Return a reward, None for one that was not given."""
    return None if value != value else round(value, 4)


def show_text(value: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a text, or the last of some messages, cut where it is long."""
    text = value if isinstance(value, str) else str(value[-1].get("content") or "")
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
