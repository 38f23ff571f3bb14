# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of a job that is to be submitted: `validate` and `plan` run on its tree, in a process of their own."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.cli.folders import take_option
from llm_trainer.common import log
from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.common.processes import PYTHON, SAFE_PATH, bind_command
from llm_trainer.config.environment import BASE_DIR, DATA_DIR, DEFAULT_BASE_DIR

# Words that are handed on to `plan`.
ASKS_PRICES = "--prices"
PRICES_FILE = "prices-file"
NUMBERS = ("rows", "tokens-per-row")
IMAGES = "images-per-row"
STOP_SECONDS = 5.0  # for the checks to clear away what they have begun


@dataclass(frozen=True)
class Budget:
    """The most that a job may cost, and the words with which `plan` finds out what it costs."""

    max_dollars: float | None
    plan_words: tuple[str, ...] = ()

    @property
    def is_asked(self) -> bool:
        """Tell whether the user asks what the job costs."""
        return self.max_dollars is not None or bool(self.plan_words)


@dataclass(frozen=True)
class Place:
    """A number of instances that a job may run on."""

    kind: str
    count: int
    keep_alive_seconds: int = 0  # which are paid for after the job

    def __str__(self) -> str:
        """Show the place in a sentence."""
        return f"{self.count} x {self.kind}"


def take_budget(words: Sequence[str]) -> tuple[Budget, list[str]]:
    """Return the budget that the words set, and the other words. Raises UserError where a number is none."""
    amount, rest = take_option(words, "max-dollars")
    plan_words = [word for word in rest if word == ASKS_PRICES]
    rest = [word for word in rest if word != ASKS_PRICES]
    for name in (PRICES_FILE, IMAGES, *NUMBERS):
        value, rest = take_option(rest, name)
        if name in NUMBERS and value is not None and not value.isdecimal():
            raise UserError(f"--{name}={value!r} is no whole number: write one above 0.")
        if value is not None:
            plan_words += [f"--{name}", os.path.abspath(value) if name == PRICES_FILE else value]
    try:
        dollars = None if amount is None else float(amount)
    except ValueError:
        dollars = -1.0
    if dollars is not None and not 0 < dollars < float("inf"):
        raise UserError(f"--max-dollars={amount!r} is no amount: write a number above 0.")
    return Budget(dollars, tuple(plan_words)), rest


def check_tree(
    tree: Path, commands: Sequence[str], places: Sequence[Place], plan_words: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return what `validate` and `plan`, those that are named, tell of the job of a tree, as JSON by their names.

    `plan` is asked about these places alone.

    They run in one process of their own, which has torch. Raises UserError where it tells nothing.
    """
    variables = {name: value for name, value in os.environ.items() if name != DATA_DIR}
    instances = ",".join(f"{place.kind}={place.count}" for place in places)
    words = ["-m", "llm_trainer.cli.tree_checks", ",".join(commands), instances, *plan_words]
    output, errors = run_to_the_end(bind_command([*PYTHON, *words]), variables | SAFE_PATH | {BASE_DIR: str(tree)})
    text = output.replace(str(tree), DEFAULT_BASE_DIR)
    try:
        found: dict[str, dict[str, Any]] = json.loads(text)
    except ValueError as error:
        reason = cut_quote(" ".join(errors.split()[-40:]))
        raise UserError(f"The job could not be checked by {' and '.join(commands)} ({reason}).") from error
    return found


def run_to_the_end(command: Sequence[str], variables: Mapping[str, str]) -> tuple[str, str]:
    """Return what a command prints on its two streams. Where this process is stopped, so is the command."""
    # In a session of its own, as a terminal's Ctrl-C would reach it twice: while it clears away what it has begun.
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            return process.communicate()
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            raise


def tell_warnings(found: Mapping[str, Any]) -> None:
    """Print the warnings of a command."""
    for text in found["warnings"]:
        log.error(f"Warning: {text}")


def find_plan_refusals(planned: Mapping[str, Any], places: Sequence[Place], budget: Budget) -> Iterator[str]:
    """Yield why a job that was planned cannot run on its instances, or may not by its budget.

    SageMaker takes one of the places.
    """
    if "instances" not in planned and planned["problems"] and budget.is_asked:
        yield from (f"The cost of the job is not known: {text}" for text in planned["problems"])
        return
    if budget.max_dollars and (currency := planned.get("currency") or "USD") != "USD":
        yield f"--max-dollars cannot be kept, since the prices are in {currency}: give prices in USD, or leave it out."
        return
    for place in places:
        entry = find_entry(planned, place)
        dollars = add_warm_pool(entry, place)
        if entry.get("fits") is False:
            yield f"The job does not fit on {place} ({entry['how']}): `llm-trainer plan` names instances that hold it."
        elif budget.max_dollars is None:
            continue
        elif not entry:
            yield f"--max-dollars cannot be kept on {place}, which `llm-trainer plan` does not know: leave one of them."
        elif dollars is None:
            yield (
                f"--max-dollars cannot be kept on {place}, since the cost is not known: give --prices, and --rows "
                "and --tokens-per-row where the data are in S3, or take a type that has a price in this region."
            )
        elif dollars > budget.max_dollars:
            yield (
                f"It costs about {dollars:.2f} dollars on {place}, more than --max-dollars={budget.max_dollars:g}: "
                "raise that, or take what `llm-trainer plan` shows first."
            )


def find_entry(planned: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Return what was planned for a place, empty where nothing was."""
    entries = {(entry["instance_type"], entry["count"]): entry for entry in planned.get("instances", [])}
    return entries.get((place.kind, place.count), {})


def add_warm_pool(entry: Mapping[str, Any], place: Place) -> float | None:
    """Return the dollars of a job with those of the instances that wait for a next one; None where not known."""
    dollars: float | None = entry.get("dollars")
    if dollars is None:
        return None
    return dollars + entry["dollars_an_hour"] * place.count * place.keep_alive_seconds / 3600


def find_affordable_seconds(planned: Mapping[str, Any], places: Sequence[Place], budget: Budget) -> int | None:
    """Return the seconds that a budget lasts on the dearest of the places, on demand; None without a budget."""
    rates = [(find_entry(planned, place).get("dollars_an_hour"), place) for place in places]
    seconds = [
        int(budget.max_dollars / (rate * place.count) * 3600) - place.keep_alive_seconds
        for rate, place in rates
        if rate and budget.max_dollars
    ]
    return min(seconds, default=None)
