# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of a job that is to be submitted: `validate` and `plan` run on its tree, each as a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.cli.folders import take_option
from llm_trainer.common import log
from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.common.processes import bind_command
from llm_trainer.config.environment import BASE_DIR, DATA_DIR, DEFAULT_BASE_DIR

# Words that are handed on to `plan`.
ASKS_PRICES = "--prices"
PLAN_OPTIONS = ("prices-file", "rows", "tokens-per-row")


@dataclass(frozen=True)
class Budget:
    """The most that a job may cost, and the words with which `plan` finds out what it costs."""

    max_dollars: float | None
    plan_words: tuple[str, ...] = ()


def take_budget(words: Sequence[str]) -> tuple[Budget, list[str]]:
    """Return the budget that the words set, and the other words. Raises UserError where it is no amount."""
    amount, rest = take_option(words, "max-dollars")
    plan_words = [word for word in rest if word == ASKS_PRICES]
    rest = [word for word in rest if word != ASKS_PRICES]
    for name in PLAN_OPTIONS:
        value, rest = take_option(rest, name)
        if value is not None:
            plan_words += [f"--{name}", os.path.abspath(value) if name == "prices-file" else value]
    try:
        dollars = None if amount is None else float(amount)
    except ValueError:
        dollars = -1.0
    if dollars is not None and not 0 < dollars < float("inf"):
        raise UserError(f"--max-dollars={amount!r} is no amount: write a number above 0.")
    return Budget(dollars, tuple(plan_words)), rest


def run_on_tree(tree: Path, *words: str) -> dict[str, Any]:
    """Return what a command of ours tells of the job of a tree, as JSON. Raises UserError where it tells nothing."""
    variables = {name: value for name, value in os.environ.items() if name != DATA_DIR} | {BASE_DIR: str(tree)}
    command = bind_command([sys.executable, "-m", "llm_trainer", *words, "--json"])
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    text = result.stdout.replace(str(tree), DEFAULT_BASE_DIR)
    try:
        found: dict[str, Any] = json.loads(text[max(text.find("\n{"), 0) :])
    except ValueError as error:
        reason = cut_quote(" ".join(result.stderr.split()[-40:]))
        raise UserError(f"`llm-trainer {words[0]}` could not check the job ({reason}).") from error
    return found


def find_errors(tree: Path) -> list[str]:
    """Return the errors that `validate` finds in a tree. Its warnings are printed."""
    found = run_on_tree(tree, "validate")
    for text in found["warnings"]:
        log.error(f"Warning: {text}")
    problems: list[str] = found["problems"]
    return problems


def find_plan_refusals(tree: Path, kinds: Mapping[str, int], budget: Budget) -> Iterator[str]:
    """Yield why the job of a tree cannot run on its instances, or may not by its budget, as `plan` tells.

    `kinds` are the types of instances, each with their number. SageMaker takes one of them.
    """
    planned = run_on_tree(tree, "plan", *budget.plan_words).get("instances", [])
    entries = {(entry["instance_type"], entry["count"]): entry for entry in planned}
    for kind, count in kinds.items():
        entry = entries.get((kind, count), {})
        place, dollars = f"{count} x {kind}", entry.get("dollars")
        if entry.get("fits") is False:
            yield f"The job does not fit on {place} ({entry['how']}): `llm-trainer plan` names instances that hold it."
        elif budget.max_dollars is None:
            continue
        elif dollars is None:
            yield (
                f"--max-dollars cannot be kept on {place}, since the cost is not known: give --prices, and --rows "
                "and --tokens-per-row where the data are in S3."
            )
        elif dollars > budget.max_dollars:
            yield (
                f"It costs about {dollars:.2f} dollars on {place}, more than --max-dollars={budget.max_dollars:g}: "
                "raise that, or take what `llm-trainer plan` shows first."
            )
