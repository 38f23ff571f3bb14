# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer validate`: all that is wrong with a job, and what it would train on, without a GPU or weights.

Writes only what `train` writes at its start too: tokenized data into the cache, and rejected_rows.jsonl.
"""

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.common.errors import MAX_LISTED_PROBLEMS, UserError
from llm_trainer.common.findings import GIB, MIB, Finding, Verdict, as_row, show_bytes
from llm_trainer.config.checks import count_processes, find_missing_hardware
from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.config.schema import Settings, redact_settings
from llm_trainer.config.secret_references import VARIABLES, is_reference, read_secret_variables
from llm_trainer.data.report import DataReport
from llm_trainer.host.nvidia_driver import read_driver
from llm_trainer.job.disk_budget import inspect_disk_need
from llm_trainer.job.inputs import Inputs, check_writable, find_inputs, find_missing_weights, find_warnings
from llm_trainer.job.job import collect_settings
from llm_trainer.launcher.user_script import names_a_script
from llm_trainer.launcher.worker_processes import build_library_variables

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class Validation:
    """What is known of a job before it starts."""

    findings: list[Finding] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # those given, without secrets
    reports: dict[str, DataReport] = field(default_factory=dict)  # of each split
    memory: dict[str, Any] = field(default_factory=dict)  # what a GPU needs, and the parts of that
    sample: str = ""  # a training row, what is trained on marked

    def tell(self, subject: str, verdict: Verdict, texts: Iterable[str]) -> None:
        self.findings += [Finding(subject, verdict, text) for text in texts]

    def list_texts(self, verdict: Verdict) -> list[str]:
        return [finding.text for finding in self.findings if finding.verdict == verdict]


def validate(arguments: Sequence[str]) -> int:
    """Print what is found out about the job of the tree; the exit code, 1 when it would fail."""
    return answer(arguments, examine)


def answer(arguments: Sequence[str], examine: Callable[[Sequence[str], bool], Validation]) -> int:
    """Print what the function finds out, as text or JSON; the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' words to each other, not to the user
    wants_json = "--json" in arguments
    in_colour = not wants_json and sys.stdout.isatty()
    # A library, or a wait for the Hub, may print too.
    with contextlib.redirect_stdout(sys.stderr if wants_json else sys.stdout):
        validation = examine([word for word in arguments if word != "--json"], in_colour)
    lines = [as_json(validation)] if wants_json else as_text(validation, in_colour)
    print(*lines, sep="\n")
    return 1 if validation.list_texts("error") else 0


def examine(arguments: Sequence[str], in_colour: bool) -> Validation:
    validation = Validation()
    try:
        environment = read_environment()
    except UserError as error:
        validation.tell("tree", "error", error.problems)
        return validation
    if names_a_script(environment.hyperparameters):
        validation.tell("script", "warning", ["the job runs a script of your own, of which nothing can be checked."])
        return validation
    settings, problems = collect_settings(environment, arguments)
    given = {name: value for name, value in redact_settings(settings).items() if settings.is_given(name)}
    validation.settings = given
    validation.tell("settings", "error", problems)
    if not problems:
        validation.tell("settings", "ok", [f"{len(given)} given"])
    inputs, problems = find_inputs(settings, environment)
    validation.tell("inputs", "error", problems)
    if not problems:
        validation.tell("inputs", "ok", [inputs.model])
        validation.tell("inputs", "ok", [source.describe() for source in (*inputs.train, *inputs.validation)])
    lack = [f"{text} Only train needs them." for text in find_missing_weights(inputs.model)]
    validation.tell("weights", "warning", lack)
    # A laptop says nothing of the GPUs that the job will have.
    validation.tell(
        "machine", "error" if environment.num_gpus else "warning", find_missing_hardware(settings, environment)
    )
    validation.tell("job", "warning", find_warnings(settings, environment, inputs))
    try:
        os.environ.update(read_secret_variables(settings, os.environ))
    except UserError as error:  # this machine's role is another than the job's
        validation.tell("secrets", "warning", error.problems)
        for name in [name for name in VARIABLES if is_reference(os.environ.get(name, ""))]:
            del os.environ[name]  # the Hub answers nothing to a token that it does not know
    os.environ.update(
        build_library_variables(inputs, settings.model.chat_template_path, settings.output.push_to_hub)
    )  # libraries read them when they are imported
    validation.findings += inspect_disk_need(settings, inputs, Path(os.environ["LLM_TRAINER_CACHE"]))
    if inputs.model and inputs.train:
        examine_data(settings, inputs, environment, validation, in_colour)
    return validation


def examine_data(
    settings: Settings, inputs: Inputs, environment: Environment, validation: Validation, in_colour: bool
) -> None:
    """Prepare the data as the job would, and tell what becomes of them."""
    from llm_trainer.data.preview import find_data_oddities, mark_sample
    from llm_trainer.data.splits import prepare_splits
    from llm_trainer.model import loading  # Transformers takes seconds to import, and has to find the variables set
    from llm_trainer.model.quantization import find_quantization_problems

    unwritable = list(check_writable(environment.output_dir, "output"))
    validation.tell("output", "warning", [f"{text} Bad rows are not listed there." for text in unwritable])
    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        rejected_rows = Path(scratch_dir if unwritable else environment.output_dir / "data") / "rejected_rows.jsonl"
        try:
            folder = loading.fetch_model(inputs.model, settings, Path(scratch_dir), with_weights=False)
            config = loading.read_config(folder, settings)
            validation.tell("model", "error", find_quantization_problems(folder, config, settings))
            tokenizer = loading.load_tokenizer(folder, settings)
            vocabulary = loading.build_vocabulary(folder, config, tokenizer, settings)
            examine_adapter(folder, config, settings, validation)
            splits, problems = prepare_splits(inputs, vocabulary, settings, rejected_rows)
        except UserError as error:
            validation.tell("tokenizer", "error", error.problems)
            return
        except OSError as error:
            validation.tell("data", "error", [f"The data could not be prepared: {error}."])
            return
    validation.tell("data", "error", problems)
    for name, split in splits.items():
        validation.reports[name] = split.report
        formats = split.report.formats.items()
        texts = [f"{key}: {rows} rows, trained on: {split.report.loss_on[key]}" for key, rows in formats]
        validation.tell(name, "ok", texts)
        if not problems:
            validation.tell(name, "warning", find_data_oddities(name, split.report))
    if not problems:
        longest_row = max(split.report.longest_row_tokens for split in splits.values())
        examine_memory(config, settings, environment, longest_row, validation)
    row = splits["train"].first_row()
    validation.sample = mark_sample(row, tokenizer, in_colour) if row else ""


def examine_adapter(folder: str, config: "PreTrainedConfig", settings: Settings, validation: Validation) -> None:
    """Tell whether the adapter can be put on the model, and be served."""
    if not settings.adapter.use_peft:
        return
    from llm_trainer.model.loading import build_skeleton
    from llm_trainer.model.lora import build_lora_config
    from llm_trainer.serving.limits import find_misplacements

    try:
        lora = build_lora_config(settings, build_skeleton(folder, config, settings))
    except UserError as error:
        validation.tell("adapter", "error", error.problems)
        return
    if not settings.output.merge_weights:
        validation.tell("adapter", "warning", find_misplacements(lora, config.get_text_config().model_type))


def examine_memory(
    config: Any, settings: Settings, environment: Environment, longest_row: int, validation: Validation
) -> None:
    """Tell what the job needs of a GPU: of those that are here, or of whichever the job will run on."""
    from llm_trainer.model.device import find_device
    from llm_trainer.model.memory.fit import (
        ATTENTION_ELSEWHERE,
        Target,
        choose_memory_plan,
        estimate_on_one_gpu,
        find_smallest_gpu,
    )
    from llm_trainer.model.memory.shape import UnknownShapeError

    on_gpu = environment.num_gpus > 0 and not settings.parallelism.use_cpu
    attention = (
        ATTENTION_ELSEWHERE if settings.model.attn_implementation == "auto" else settings.model.attn_implementation
    )
    driver = read_driver() if on_gpu else None
    try:
        if driver:
            num_processes = count_processes(settings.parallelism, environment)
            free_bytes = min(gpu.memory_bytes for gpu in driver.gpus)
            target = Target(find_device(settings), num_processes * len(environment.hosts), free_bytes)
            fit = choose_memory_plan(config, settings, longest_row, target, attention)
            validation.memory = fit.describe()
            validation.tell("memory", "warning" if fit.warning else "ok", [fit.warning or fit.reason])
            return
        for way, need in estimate_on_one_gpu(config, settings, longest_row, attention).items():
            size = find_smallest_gpu(need)
            fitting = f"one GPU of {size} GiB holds that" if size else "no single GPU holds that"
            validation.memory[way] = {"gpu_gib": size, **need.describe()}
            validation.tell("memory", "ok", [f"{way} needs {show_bytes(need.total_bytes)} on a GPU: {fitting}"])
    except UserError as error:
        validation.tell("memory", "error", error.problems)
    except UnknownShapeError as error:
        validation.tell("memory", "warning", [f"What memory the model needs is not known, since {error}."])


def as_json(validation: Validation) -> str:
    problems = validation.list_texts("error")
    values = {
        "ok": not problems,
        "problems": problems,
        "warnings": validation.list_texts("warning"),
        "data": {name: report.summary() for name, report in validation.reports.items()},
        "memory": validation.memory,
        "sample": validation.sample,
        "settings": validation.settings,
    }
    return json.dumps(values, default=str)


def as_text(validation: Validation, in_colour: bool) -> Iterator[str]:
    errors = [finding for finding in validation.findings if finding.verdict == "error"]
    unlisted = errors[MAX_LISTED_PROBLEMS:]
    for finding in validation.findings:
        if finding not in unlisted:
            yield as_row(finding, in_colour)
    if unlisted:
        yield f"and {len(unlisted)} more errors, which --json lists."
    if validation.reports:
        yield from ("", *as_table({name: count(report) for name, report in validation.reports.items()}, "data"))
    if validation.memory:
        yield from ("", *as_memory_table(validation.memory))
    if validation.sample:
        from llm_trainer.data.preview import describe_marks

        yield from ("", f"The first training row ({describe_marks(in_colour)}):", validation.sample)
    num_warnings = len(validation.list_texts("warning"))
    is_plan = validation.memory and not validation.reports
    verdict = "fail" if errors else "start, as far as is known without its data" if is_plan else "start"
    yield f"errors: {len(errors)}, warnings: {num_warnings}; this job would {verdict}."


def count(report: DataReport) -> dict[str, str]:
    counts = {
        "rows": report.num_rows,
        "tokens": report.num_tokens,
        "trained on": f"{report.supervised_share:.1%}",
        **report.length_percentiles(),
        "cut": report.num_truncated_rows,
        "left out": report.num_dropped_rows + report.num_unsupervised_rows,
        "bad": report.num_bad_rows,
        "duplicates": report.num_duplicate_rows,
        "in validation": report.num_rows_in_validation,
    }
    return {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in counts.items()}


def as_memory_table(memory: dict[str, Any]) -> Iterator[str]:
    """GiB of each part on a GPU, a column a way of training."""
    needs = memory if "estimate" not in memory else {"here": memory["estimate"]} if memory["estimate"] else {}
    names = dict.fromkeys(part for need in needs.values() for part, size in need["parts"].items() if size >= MIB)
    rows = {part: {way: f"{need['parts'].get(part, 0) / GIB:.2f}" for way, need in needs.items()} for part in names}
    rows["in all"] = {way: f"{need['total_bytes'] / GIB:.2f}" for way, need in needs.items()}
    yield from as_table(rows, "GiB a GPU")


def as_table(rows: dict[str, dict[str, str]], title: str) -> Iterator[str]:
    """A line a row below a line of the columns' names, right-aligned."""
    for name, cells in (title, {column: column for row in rows.values() for column in row}), *rows.items():
        widths = {column: max(len(column), *(len(row.get(column, "")) for row in rows.values())) for column in cells}
        yield f"{name:{max(10, *map(len, rows))}}" + "".join(
            f"  {cells[column]:>{width}}" for column, width in widths.items()
        )
