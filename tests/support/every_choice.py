# SPDX-License-Identifier: Apache-2.0
"""Every choice of every enumerated setting, each in a job of its own: refused before the start, or trained.

    python tests/support/every_choice.py

reads the job of the tree in SAGEMAKER_BASE_DIR and prints, one JSON object a line, what became of each choice. A job is
a fork of this process, which has imported everything and validated the job once: a fork finds the libraries' caches
filled. Choices that are defaults share one job, and have jobs of their own only where that one does not train.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from llm_trainer.config.schema import FIELDS, split_union

# Settings without which a choice could not be told from its absence, or is refused.
COMPANIONS: dict[str, dict[str, str]] = {
    "bnb_4bit_quant_type": {"load_in_4bit": "true"},
    "bnb_4bit_use_double_quant": {"load_in_4bit": "true"},
    "loftq": {"load_in_4bit": "true"},
    "merge_base": {"merge_weights": "true", "load_in_4bit": "true"},
    "packing_strategy": {"packing": "true"},
    "eval_packing": {"packing": "true"},
    "train_sampling_strategy": {"packing": "false"},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
    "warmup_stable_decay": {"lr_scheduler_kwargs": '{"num_decay_steps": 1}'},
    "eval_strategy": {"eval_steps": "1"},
    "greater_is_better": {"load_best_model_at_end": "true"},
    "dataloader_persistent_workers": {"dataloader_num_workers": "1"},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": "1"},
    "dataloader_in_order": {"dataloader_num_workers": "1"},
}


class Choice(typing.NamedTuple):
    """A setting and one of the values among which it is chosen, as a user writes it."""

    name: str
    value: str

    @property
    def companions(self) -> dict[str, str]:
        """The settings without which it could not be told from its absence, or is refused."""
        return COMPANIONS.get(self.name, {}) | COMPANIONS.get(self.value, {})

    def list_words(self) -> list[str]:
        """Return the words of a command line that chooses it, with what belongs to it."""
        return [f"--{name}={value}" for name, value in {**self.companions, self.name: self.value}.items()]


def list_choices() -> Iterator[Choice]:
    """Yield the choices of all settings: texts of a fixed list, true and false."""
    for name, field in FIELDS.items():
        for part in split_union(field.annotation):
            values = typing.get_args(part) if typing.get_origin(part) is Literal else ()
            for value in ("true", "false") if part is bool else values:
                yield Choice(name, value)


def changes_nothing(choice: Choice) -> bool:
    """Tell whether a choice is a default that the job takes: two of these cannot be at odds."""
    from llm_trainer.common.errors import UserError
    from llm_trainer.job.job import read_job

    if str(FIELDS[choice.name].default).lower() != choice.value or choice.companions:
        return False
    try:
        read_job(choice.list_words())
    except UserError:
        return False
    return True


def run_choices(choices: Sequence[Choice], base_dir: Path, results: Any) -> None:
    """Put what becomes of a job with these choices: refused, trained, or what it died of."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    from llm_trainer.cli.validate import examine_job
    from llm_trainer.common.errors import UserError
    from llm_trainer.job.job import read_job
    from llm_trainer.journal.journal import FILE_NAME, Journal, read_records
    from llm_trainer.journal.timeline import Timeline
    from llm_trainer.train import train

    for folder in ("model", "checkpoints", "output", "scratch"):
        shutil.rmtree(base_dir / folder, ignore_errors=True)
    (base_dir / "scratch").mkdir()
    words = [word for choice in choices for word in choice.list_words()]
    try:
        job = read_job(words)
    except UserError as error:
        return results.put(("refused", str(error)))
    findings = examine_job(words, in_colour=False).findings
    if errors := [finding.text for finding in findings if finding.verdict == "error"]:
        return results.put(("refused", " ".join(errors)))
    try:
        journal = Journal(base_dir / "output/data" / FILE_NAME)
        train(job, base_dir / "scratch", Timeline(time.time(), journal))
        metrics = [record["values"] for record, _ in read_records(journal.file) if record["kind"] == "metrics"]
    except BaseException:
        return results.put(("died", traceback.format_exc()))
    has_loss = any("train_loss" in values for values in metrics)
    return results.put(("trained" if has_loss else "trained without a line", ""))


def fork_job(choices: Sequence[Choice], base_dir: Path) -> tuple[str, str]:
    """Run a job with these choices in a fork. Return what became of it, and the words that go with that."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=run_choices, args=(choices, base_dir, results))
    process.start()
    process.join()
    return ("died", f"exit code {process.exitcode}") if results.empty() else results.get()


def main() -> None:
    """Run the jobs, after all that they have in common."""
    import llm_trainer.train  # noqa: F401 - once, for all forks
    from llm_trainer.cli.validate import examine_job
    from llm_trainer.common.library_noise import silence_libraries

    silence_libraries()
    examine_job([], in_colour=False)
    gc.freeze()  # a collection in a fork would go through all of it, and copy its pages
    base_dir = Path(os.environ["SAGEMAKER_BASE_DIR"])
    choices = list(list_choices())
    defaults = list(filter(changes_nothing, choices))
    shared = fork_job(defaults, base_dir)
    for choice in choices:
        is_told = choice in defaults and shared[0] == "trained"
        outcome, text = shared if is_told else fork_job([choice], base_dir)
        print(json.dumps({"choice": "=".join(choice), "outcome": outcome, "text": text}), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
