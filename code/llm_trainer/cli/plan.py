# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer plan`: how a job's model would be loaded and computed, and what that takes on each instance type.

The model's config.json is enough: neither data nor weights nor a GPU are needed. `validate` tells all the rest.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.gpu_memory import examine_batch, examine_memory
from llm_trainer.cli.plan_instances import NO_OPTIONS, Lengths, PlanOptions, examine_instances
from llm_trainer.cli.validate import prepare_data
from llm_trainer.cli.validation import Validation, collect_findings, print_validation
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.job.earlier_adapter import find_adapter
from llm_trainer.job.inputs import Inputs, find_inputs, find_model
from llm_trainer.job.job import Job, collect_settings, fetch_earlier_adapter
from llm_trainer.launcher.worker_processes import build_library_variables
from llm_trainer.readers.sources import find_train_sources

if TYPE_CHECKING:
    from llm_trainer.data.splits import Split
    from llm_trainer.model.plan import ModelPlan

USUAL_ROW_TOKENS = 1024  # where max_length=null sets no limit


def plan(words: Sequence[str], as_json: bool, options: PlanOptions = NO_OPTIONS) -> int:
    """Print what is planned for the job, and return the exit code: 1 when it cannot be trained so."""
    return print_validation(lambda in_colour: examine_model(words, replace(options, in_colour=in_colour)), as_json)


def examine_model(words: Sequence[str], options: PlanOptions = NO_OPTIONS) -> Validation:
    """Return what is planned for the job with the settings of these words. Sets environment variables."""
    return collect_findings(lambda validation: examine_loading(words, options, validation))


def examine_loading(words: Sequence[str], options: PlanOptions, validation: Validation) -> None:
    """Add how the model would be loaded, and what it takes on instances. Sets environment variables."""
    try:
        environment = read_environment()
        settings, problems = collect_settings(environment, words)
    except UserError as error:
        validation.add_findings("tree", "error", error.problems)
        return
    examine_batch(settings, environment, validation)
    name, missing = find_model(settings.model, environment, needs_tokenizer=False)
    adapter, faults = find_adapter(settings.adapter, environment)
    if problems or missing or faults:
        validation.add_findings("settings", "error", [*problems, *missing, *faults])
        return
    inputs = Inputs(name, [], [], environment.model_dir, environment.model_dir, adapter)
    try:
        planned, settings = plan_loading(Job(environment, settings, inputs))
    except UserError as error:
        validation.add_findings("model", "error", error.problems)
        return
    validation.add_findings("model", "ok", [name, *planned.reasons])
    job = Job(environment, settings, inputs)
    lengths = measure_lengths(job, options, validation)
    longest_row = lengths.longest_row or settings.data.max_length or max(lengths.train, default=USUAL_ROW_TOKENS)
    if lengths.longest_row is None:
        validation.add_findings("memory", "ok", [f"for rows of {longest_row} tokens, which data may stay below"])
    scenario = examine_memory(planned.config, settings, environment, longest_row, validation)
    if scenario is not None and not validation.list_texts("error"):
        examine_instances(scenario, lengths, settings.output.merge_weights, options, validation)


def plan_loading(job: Job) -> "tuple[ModelPlan, Settings]":
    """Return how the model of a job would be loaded, and the settings with what an earlier adapter tells.

    Raises UserError where it cannot be loaded.
    """
    settings, inputs = job.settings, job.inputs
    os.environ.update(build_library_variables(inputs, settings.model.chat_template_path, settings.output.push_to_hub))
    from llm_trainer.model import loading  # Transformers has to find the variables set
    from llm_trainer.model.device import find_device
    from llm_trainer.model.plan import PlanSettings, plan_model
    from llm_trainer.model.positions import bound_length
    from llm_trainer.model.precision import choose_precision

    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        settings = fetch_earlier_adapter(job, Path(scratch_dir)).settings
        folder = loading.fetch_model(inputs.model, settings.model, Path(scratch_dir), with_weights=False)
        device = find_device(settings.parallelism.use_cpu)
        precision = choose_precision(settings.model, settings.adapter, device)
        sections = PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output)
        planned = plan_model(folder, sections, device, precision)
        data = bound_length(settings.data, planned.num_positions)
        return planned, settings.model_copy(update={"data": data})


def measure_lengths(job: Job, options: PlanOptions, validation: Validation) -> Lengths:
    """Return the lengths of the rows that the options name, else of the data of the job where they are there."""
    given = [options.rows, options.tokens_per_row]
    if any(number is not None for number in given):
        if not all(number is not None and number > 0 for number in given):
            text = "--rows and --tokens-per-row stand for data together: give both, as whole numbers above zero."
            validation.add_findings("options", "error", [text])
            return Lengths()
        return Lengths(Counter({options.tokens_per_row or 0: options.rows or 0}))
    if not find_train_sources(job.settings.data, job.environment)[0]:
        return Lengths()
    inputs, problems = find_inputs(job.settings, job.environment)
    splits = {} if problems else tokenize_data(Job(job.environment, job.settings, inputs), validation)
    if not any(split.report.lengths for split in splits.values()):
        text = "The tokens of the data are not known (`validate` says why): give --rows and --tokens-per-row."
        validation.add_findings("data", "warning", [text])
        return Lengths()
    for name, split in splits.items():
        validation.add_findings(name, "ok", [f"{split.report.num_rows:,} rows, {split.report.num_tokens:,} tokens"])
    validated = splits["validation"].report.lengths if "validation" in splits else Counter[int]()
    longest_row = max(split.report.longest_row_tokens for split in splits.values())
    return Lengths(splits["train"].report.lengths, validated, longest_row)


def tokenize_data(job: Job, validation: Validation) -> "Mapping[str, Split]":
    """Return the splits of a job, tokenized as `validate` does; none where that is not possible."""
    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as folder, suppress(UserError, OSError):
        return prepare_data(job, Path(folder), Path(folder) / "rejected_rows.jsonl", validation).splits
    return {}
