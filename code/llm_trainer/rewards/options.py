# SPDX-License-Identifier: Apache-2.0
"""Names and options of the built-in rewards, and what is wrong with given ones."""

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SOLUTION_COLUMNS = ("solution", "answer")  # where the right answer is looked for, in this order


@dataclass(frozen=True)
class Kind:
    """A kind of values: the types that it has in JSON, and its rule as the end of a sentence."""

    types: tuple[type, ...]
    rule: str
    least: int = 0  # of a number

    def fits(self, value: Any) -> bool:
        """Tell whether a value is of this kind. True and false are no numbers."""
        if isinstance(value, bool):
            return bool in self.types
        return isinstance(value, self.types) and value != "" and (not isinstance(value, int) or value >= self.least)


TEXT = Kind((str,), "a text")
SWITCH = Kind((bool,), "true or false")
COUNT = Kind((int,), "a whole number above 0", least=1)
ROOM = Kind((int,), "a whole number of at least 0")
SCHEMA = Kind((dict, str), "a JSON Schema, or the name of a file with one in a channel")

MAXIMA, TARGETS = ("max_tokens", "max_characters"), ("target_tokens", "target_characters")
OPTIONS: dict[str, dict[str, Kind]] = {
    "exact_match": {"column": TEXT, "extract": TEXT, "ignore_case": SWITCH},
    "math": {"column": TEXT, "extract": TEXT},
    "regex": {"pattern": TEXT},
    "json_schema": {"schema": SCHEMA},
    "length": {**dict.fromkeys((*MAXIMA, *TARGETS), COUNT), "buffer": ROOM},
}
REQUIRED = {"regex": "pattern", "json_schema": "schema"}
NEEDS_SOLUTION = ("exact_match", "math")


def suggest(name: str, names: Collection[str]) -> str:
    """Return the end of a sentence on an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"the nearest is {close[0]!r}." if close else f"give one of {', '.join(names)}."


def find_option_problems(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each option of a built-in reward that is unknown, missing or of another kind."""
    kinds = OPTIONS[name]
    for option, value in options.items():
        if option not in kinds:
            yield f"reward_options: {name} has no option {option!r}: {suggest(option, kinds)}"
        elif not kinds[option].fits(value):
            yield f"reward_options: {name}: {option}={json.dumps(value)} has to be {kinds[option].rule}: change it."
    required = REQUIRED.get(name)
    if required and required not in options:
        yield f"reward_options: {name} lacks its option {required!r}, {kinds[required].rule}: add it."
    if name == "length":
        yield from find_length_problems(options)


def find_length_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence where the bounds of a length contradict each other, or are missing."""
    given = [option for option in (*MAXIMA, *TARGETS) if option in options]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "has no bound"
        yield f"reward_options: length {found}: give one of {', '.join((*MAXIMA, *TARGETS))}."
        return
    buffer, bound = options.get("buffer"), options[given[0]]
    if buffer is None:
        return
    if given[0] in TARGETS:
        yield f"reward_options: length: buffer={buffer!r} goes with a maximum and not with {given[0]}: leave it out."
    elif ROOM.fits(buffer) and COUNT.fits(bound) and buffer > bound:
        yield f"reward_options: length: buffer={buffer} has to be at most {given[0]}={bound}: lower it."


def find_column_problems(name: str, options: Mapping[str, Any], columns: Collection[str]) -> Iterator[str]:
    """Yield a sentence where rows lack the column of the right answer that a built-in reward compares with."""
    if name not in NEEDS_SOLUTION:
        return
    wanted = (options["column"],) if "column" in options else SOLUTION_COLUMNS
    if not any(column in columns for column in wanted):
        found = ", ".join(sorted(columns)) or "no other columns"
        yield (
            f"reward_functions={name!r} needs the column {' or '.join(map(repr, wanted))}, and the rows have {found}: "
            f'add it, or name another by reward_options={{"{name}": {{"column": "NAME"}}}}.'
        )
