# SPDX-License-Identifier: Apache-2.0
"""The user's own reward function, in its helper process: loaded from its file, called, and its result read."""

import asyncio
import importlib.util
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.rewards.options import suggest

# What each function gets by name, beside the columns of its rows.
OWN_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
MAX_TRACE_CHARACTERS = 16384
Function = Callable[..., Any]


class WrongReward(Exception):  # noqa: N818 (it names what is wrong)
    """A function's result that is no reward. Its text is the rest of a sentence."""

    def __init__(self, text: str, row: int | None = None) -> None:
        """`row` is the number of the completion, where the result of one is wrong."""
        super().__init__(text)
        self.row = row


@dataclass
class Notes:
    """Notes of a function for TRL, beside its rewards: columns for the table of completions, and metrics."""

    extra: list[tuple[str, list[Any]]] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep a column, one value for each completion. Values that JSON lacks become texts."""
        self.extra.append((str(column), list(values)))

    def log_metric(self, name: str, value: float) -> None:
        """Keep a metric."""
        self.metrics.append((str(name), float(value)))


def load_function(choice: Mapping[str, Any]) -> Function:
    """Return the user's function of a choice.

    Raises UserError where its file does not import or has none of the name, and where it takes other arguments.
    """
    entry, file, name = choice["entry"], Path(choice["file"]), choice["name"]
    sys.dont_write_bytecode = True  # the user's channel stays as it is
    sys.path.append(str(file.parent))  # last: what lies beside the file takes no library's place
    spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise UserError(
            f"reward_functions={entry!r}: {file.name} raises {describe_error(error, file)} when it is imported: "
            "correct it."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"reward_functions={entry!r}: {file.name} has no function {name!r}: {list_functions(module, name)}"
        )
    check_arguments(choice, function)
    return function


def list_functions(module: ModuleType, name: str) -> str:
    """Return the end of a sentence on a missing function: the nearest that the file has, or all of them."""
    own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_" and is_own(value, module)]
    return suggest(name, own) if own else f"write `def {name}(completions, **columns)` there."


def is_own(value: Any, module: ModuleType) -> bool:
    """Tell whether a function was written in the file itself."""
    return getattr(value, "__module__", None) == module.__name__


def check_arguments(choice: Mapping[str, Any], function: Function) -> None:
    """Raise UserError where the function does not take what it is called with, or needs what the rows lack."""
    key, columns = f"reward_functions={choice['entry']!r}", choice["columns"]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        raise UserError(f"{key} takes no further columns, and gets all: end its parameters with `**columns`.")
    given = {*OWN_ARGUMENTS, *choice["options"], *(columns or ())}
    named = [each for each in parameters if each.kind is not each.VAR_KEYWORD and each.default is each.empty]
    for each in named:
        if each.kind is each.POSITIONAL_ONLY:
            raise UserError(f"{key} takes {each.name!r} by position alone, and gets it by name: remove the `/`.")
        if columns is not None and each.kind is not each.VAR_POSITIONAL and each.name not in given:
            found = ", ".join(columns) or "no other columns"
            raise UserError(
                f"{key} takes {each.name!r}, and the rows have {found}: rename the parameter or the column, give it "
                "by reward_options, or give it a default."
            )


def call_function(function: Function, request: dict[str, Any], runner: asyncio.Runner, file: str) -> dict[str, Any]:
    """Return the answer to a request: the rewards with what was noted, or an error's sentence."""
    num_rows, notes = len(request["completions"]), Notes()
    request["trainer_state"] = SimpleNamespace(**request["trainer_state"])
    try:
        result = function(**request, log_extra=notes.log_extra, log_metric=notes.log_metric)
        if inspect.isawaitable(result):
            result = runner.run(wait_for(result))  # one loop for all calls, as clients belong to a loop
        return {"rewards": read_rewards(result, num_rows), "extra": notes.extra, "metrics": notes.metrics}
    except WrongReward as error:
        return {"error": str(error), "row": error.row}
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()[-MAX_TRACE_CHARACTERS:]
        return {"error": f"raised {describe_error(error, Path(file))}", "traceback": trace}


async def wait_for(result: Awaitable[Any]) -> Any:
    """Return what is awaited."""
    return await result


def read_rewards(result: Any, num_rows: int) -> list[float | None]:
    """Return a function's result as numbers, and None for completions without a reward. Raises WrongReward."""
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise WrongReward(f"returned {describe_type(result)} and no list")
    values = list(itertools.islice(result, num_rows + 1))
    if len(values) != num_rows:
        count = f"more than {num_rows}" if len(values) > num_rows else len(values)
        raise WrongReward(f"returned {count} rewards where each completion needs one,")
    return [None if value is None else read_number(value, row) for row, value in enumerate(values)]


def read_number(value: Any, row: int) -> float:
    """Return a number of Python, NumPy or torch as a float. Raises WrongReward for all else, NaN and infinity too."""
    if not hasattr(value, "__float__"):
        raise WrongReward(f"returned {describe_type(value)} as a reward", row)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor of several numbers
        raise WrongReward(f"returned {describe_type(value)} as a reward ({quote_error(error)})", row) from error
    if not math.isfinite(number):
        raise WrongReward(f"returned {number} as a reward", row)
    return number


def describe_type(value: Any) -> str:
    """Return the name of a value's type, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def describe_error(error: BaseException, file: Path) -> str:
    """Return an error's type and text, and the last line of the user's file that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError):
        text, line = error.msg, error.lineno
        place = f" (line {line} of {Path(error.filename or file).name})"
    else:
        text = quote_error(error)
        place = f" (line {frames[-1].lineno} of {file.name})" if frames else ""
    name = type(error).__name__
    return f"{name if text == name else f'{name}: {text}'}{place}"
