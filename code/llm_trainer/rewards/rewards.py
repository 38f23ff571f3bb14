# SPDX-License-Identifier: Apache-2.0
"""Rewards as TRL's trainers call them, each computed by a helper process.

A user's function that raises, hangs, ends its process or returns no rewards ends the job: a silent zero would train
for something else. What a model has written never ends it: a built-in reward that cannot judge in time gives 0.0.
"""

import json
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.rewards.choice import Choice, parse_choice, read_schema
from llm_trainer.rewards.options import SOLUTION_COLUMNS
from llm_trainer.rewards.process import EndedHelper, HelperFault, HelperProcess, SilentHelper

LOAD_SECONDS = 120.0  # a user's file may import whatever it likes
ROW_CPU_SECONDS = 5.0  # of computing for one completion, in a built-in reward: what math-verify allows itself
MAX_PROMPT_CHARACTERS = 80
MAX_WARNINGS = 5
STATE_FIELDS = ("global_step", "max_steps", "epoch", "num_train_epochs")  # of TRL's `trainer_state`
NOTED = ("log_extra", "log_metric")  # what a function may tell TRL beside its rewards
Rows = dict[str, Sequence[Any]]  # prompts, completions, completion_ids and columns, a value of each for a completion


class Reward:
    """A reward that a helper process computes. `__name__` is what TRL logs it by."""

    def __init__(self, choice: Choice, timeout_seconds: float, columns: Collection[str] | None = None) -> None:
        """Start the process and load the function. `columns` are those of the rows, None where they are not known.

        Raises UserError where the function cannot be loaded.
        """
        self.choice, self.timeout_seconds, self.columns = choice, timeout_seconds, columns
        self.__name__ = choice.name
        self.key = f"reward_functions={choice.entry!r}"
        self.process = self.start()

    def __enter__(self) -> Self:
        """Return the reward itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self.process.close()

    def start(self) -> HelperProcess:
        """Return a process that has loaded the function. Raises UserError where it cannot."""
        process = HelperProcess(self.choice.entry)
        request = {
            "entry": self.choice.entry,
            "name": self.choice.name,
            "file": str(self.choice.file) if self.choice.file else None,
            "options": self.choice.options,
            "columns": None if self.columns is None else sorted(self.columns),
            "row_cpu_seconds": min(ROW_CPU_SECONDS, self.timeout_seconds / 2),
        }
        try:
            answer = process.ask(request, LOAD_SECONDS)
        except HelperFault as fault:
            end_process(process, fault)
            raise UserError(f"{self.key} {fault} while it was imported: correct what its file does then.") from fault
        if "problem" in answer:
            process.close()
            raise UserError(answer["problem"])
        return process

    def ask(self, rows: Rows, seconds: float, trainer_state: Any = None) -> dict[str, Any]:
        """Return the process's answer on some rows. Raises HelperFault, and UserError for a column that JSON lacks."""
        request: dict[str, Any] = {**rows, "trainer_state": trainer_state}
        try:
            return self.process.ask(request, seconds)
        except (TypeError, ValueError) as error:
            name = next(name for name in request if not is_json(request[name]))
            raise UserError(
                f"{self.key} cannot be given the column {name!r} ({error}): have texts, numbers and lists there."
            ) from error

    def describe(self, text: str, rows: Rows, row: int | None, fix: str) -> str:
        """Return the sentence on a failure, with the completion in which it happened, if it is known."""
        count = len(rows["completions"])
        prompt = show_prompt(rows["prompts"][row or 0])
        place = f"{count} completions, the first" if row is None and count > 1 else "the completion"
        return f"{self.key} {text} for {place} of the prompt {prompt}: {fix}."

    def fail(self, fault: HelperFault, rows: Rows) -> UserError:
        """End a process that gave no answer. Return the error to raise."""
        end_process(self.process, fault)
        if isinstance(fault, SilentHelper):
            text = f"gave no answer within reward_timeout_seconds={self.timeout_seconds:g}"
            fix = "have it wait and compute for less, or raise reward_timeout_seconds (the log tells where it was)"
        else:
            text, fix = str(fault), "have it return its rewards, and leave its process as it is"
        return UserError(self.describe(text, rows, None, fix))


class OwnReward(Reward):
    """A user's function, which is called once for all completions."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Return a reward for each completion, None for one without. Raises UserError where the function gives none.

        `columns` hold a value for each completion, and what TRL adds: its state, and where to note what else is told.
        """
        state, extra, metric, _ = (columns.pop(name, None) for name in ("trainer_state", *NOTED, "environments"))
        rows: Rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        known = {name: getattr(state, name, None) for name in STATE_FIELDS}
        try:
            answer = self.ask(rows, self.timeout_seconds, known)
        except HelperFault as fault:
            raise self.fail(fault, rows) from fault
        if "error" in answer:
            raise self.explain(answer, rows, known)
        for note, noted in ((extra, answer["extra"]), (metric, answer["metrics"])):
            for name, value in noted if note else ():
                note(name, value)
        return answer["rewards"]

    def explain(self, answer: Mapping[str, Any], rows: Rows, known: Any) -> UserError:
        """Return the error for a function that raised, or returned no rewards. The process ends."""
        if "traceback" in answer:
            log.error(answer["traceback"])
        row = answer.get("row")
        if row is None and "traceback" in answer:
            row = self.find_row(rows, known)
        self.process.close()
        fix = "return a list with a number for each completion, or None for one without a reward"
        return UserError(self.describe(answer["error"], rows, row, f"correct the function, and {fix}"))

    def find_row(self, rows: Rows, known: Any) -> int | None:
        """Return the first completion for which the function raises by itself too, None where there is none in time."""
        deadline = time.monotonic() + self.timeout_seconds
        try:
            for row in range(len(rows["completions"])):
                if "error" in self.ask(select(rows, row), deadline - time.monotonic(), known):
                    return row
        except HelperFault:
            pass
        return None


class BuiltInReward(Reward):
    """A built-in reward, which judges one completion after the other."""

    num_warnings = 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Return a reward for each completion, None where its row has no answer to compare with."""
        needed = {*SOLUTION_COLUMNS, self.choice.options.get("column")}
        rows: Rows = {name: values for name, values in columns.items() if name in needed}
        rows |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        return [self.judge(select(rows, row)) for row in range(len(completions))]

    def judge(self, row: Rows) -> float | None:
        """Return the reward of one completion: 0.0 where judging it computes without an end."""
        try:
            answer = self.ask(row, self.timeout_seconds)
        except EndedHelper as fault:
            if fault.exit_code != -signal.SIGPROF:
                raise self.fail(fault, row) from fault
            self.process = self.start()
            self.warn("could not be judged within its bounds of computing, and gets 0", row)
            return 0.0
        except HelperFault as fault:
            raise self.fail(fault, row) from fault
        if "error" in answer:
            self.process.close()
            raise UserError(self.describe(f"cannot judge: {answer['error']}", row, 0, "correct the rows"))
        (reward,) = answer["rewards"]
        if reward is None:
            self.warn("has nothing to be compared with in its row, and gets no reward", row)
        return reward

    def warn(self, text: str, row: Rows) -> None:
        """Warn of one completion, a few times in all."""
        self.num_warnings += 1
        if self.num_warnings <= MAX_WARNINGS:
            last = "; further ones are not told" if self.num_warnings == MAX_WARNINGS else ""
            prompt = show_prompt(row["prompts"][0])
            log.warning(f"{self.__name__}: a completion of the prompt {prompt} {text}{last}.", every_rank=True)


def load_rewards(
    reward_functions: Sequence[str],
    reward_options: Mapping[str, Mapping[str, Any]],
    channels: Mapping[str, Path],
    timeout_seconds: float,
    columns: Collection[str] | None = None,
) -> list[Reward]:
    """Return the rewards in their order, each with its process. Raises UserError where one cannot be loaded.

    `columns` are those of the rows, None where they are not known.
    """
    choices = [parse_choice(entry, reward_options.get(entry, {}), channels) for entry in reward_functions]
    return [load_reward(read_schema(choice, channels), timeout_seconds, columns) for choice in choices]


def load_reward(choice: Choice, timeout_seconds: float, columns: Collection[str] | None = None) -> Reward:
    """Return one reward with its process. Raises UserError where it cannot be loaded."""
    return (OwnReward if choice.file else BuiltInReward)(choice, timeout_seconds, columns)


def end_process(process: HelperProcess, fault: HelperFault) -> None:
    """End a process that gave no answer. One that hangs prints where, before."""
    if isinstance(fault, SilentHelper):
        process.trace()
    process.close()


def select(rows: Rows, row: int) -> Rows:
    """Return one of the rows."""
    return {name: values[row : row + 1] for name, values in rows.items()}


def show_prompt(prompt: Any) -> str:
    """Return a prompt for a sentence: its last message, cut short."""
    text = str(prompt[-1].get("content") if isinstance(prompt, list) and prompt else prompt)
    shown = " ".join(text.split())
    cut = shown if len(shown) <= MAX_PROMPT_CHARACTERS else f"{shown[:MAX_PROMPT_CHARACTERS]}..."
    return repr(cut_quote(cut))


def is_json(value: Any) -> bool:
    """Tell whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
