# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer plan`: how a job's model would be loaded and computed, and what that takes on each instance type.

The model's config.json is enough: neither data nor weights nor a GPU are needed. `validate` tells all the rest.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.gpu_memory import Models, build_elsewhere, examine_batch, examine_memory
from llm_trainer.cli.plan_instances import (
    NO_OPTIONS,
    Basis,
    Lengths,
    PlanOptions,
    build_outline,
    examine_instances,
    read_basis,
)
from llm_trainer.cli.validate import PreparedData, prepare_data, read_teacher
from llm_trainer.cli.validation import Validation, collect_findings, print_validation
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import IMAGE_METHODS, DataSettings
from llm_trainer.config.teacher import derive_teacher
from llm_trainer.job.earlier_adapter import find_adapter
from llm_trainer.job.inputs import Inputs, find_inputs, find_model, find_teacher
from llm_trainer.job.job import Job, collect_settings, fetch_earlier_adapter
from llm_trainer.launcher.quick_imports import import_quickly, leave_out_bitsandbytes
from llm_trainer.launcher.worker_processes import build_library_variables
from llm_trainer.readers.sources import find_train_sources, find_validation_sources

if TYPE_CHECKING:
    from llm_trainer.data.images.row_images import DrawnImages
    from llm_trainer.model.device import Device
    from llm_trainer.model.memory.scenario import MemoryScenario
    from llm_trainer.model.plan import ModelPlan, PlanSettings
    from llm_trainer.model.teacher.teacher import Teacher

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
    examine_batch(settings, environment, validation, runs_here=False)
    name, missing = find_model(settings.model, environment, needs_tokenizer=False)
    adapter, faults = find_adapter(settings.adapter, environment)
    theirs = derive_teacher(settings.model, settings.methods, environment.channels)
    teacher, lacks = find_teacher(settings.data.method, theirs, environment, needs_tokenizer=False)
    validation.add_findings("settings", "error", [*problems, *missing, *faults, *lacks])
    basis = read_basis(options, validation)
    if basis is None or problems or missing or faults or lacks:
        return
    inputs = Inputs(name, [], [], environment.model_dir, environment.model_dir, adapter, teacher)
    job = Job(environment, settings, inputs)
    models = (settings.model, settings.methods), settings.training.optim, name, teacher
    with leave_out_bitsandbytes(*models), import_quickly(settings.model):  # a model's many parts are no garbage
        examine_job(job, options, basis, validation)


def examine_job(job: Job, options: PlanOptions, basis: Basis, validation: Validation) -> None:
    """Add how the model of a job would be loaded, and what it takes on instances. Sets environment variables."""
    try:
        planned, settings, teacher, drawn = plan_loading(job, options, validation)
    except UserError as error:
        validation.add_findings("model", "error", error.problems)
        return
    validation.add_findings("model", "ok", [job.inputs.model, *planned.reasons])
    validation.add_findings("teacher", "ok", [job.inputs.teacher] if teacher else [])
    job = Job(job.environment, settings, job.inputs)
    lengths = measure_lengths(job, options, drawn, validation)
    longest_row = choose_longest_row(lengths, settings.data, validation)
    scenario = plan_memory(Models(planned.config, teacher, lengths.images), job, longest_row, validation)
    validation.add_findings("time", "warning", find_time_warnings(settings))
    if settings.data.generates and settings.methods.use_vllm:
        return
    if scenario is not None and not validation.list_texts("error"):
        outline = build_outline(scenario, lengths, settings.output.merge_weights, basis)
        examine_instances(replace(outline, places=options.places), validation, options.in_colour)


def find_time_warnings(settings: Settings) -> Iterator[str]:
    """Yield a sentence where the time of a job is not known, or rests on how long its completions become."""
    if not settings.data.generates:
        return
    if settings.methods.use_vllm:
        yield "use_vllm=true: how long vLLM takes to write completions is not known, so no time and no price is told."
        return
    written = settings.methods.count_written(settings.data.method)
    yield (
        f"all completions count as max_completion_length={written} tokens long, and the low end of the range as half "
        "of that. The time of reward functions is not known and not in it. --learn does not change the steps."
    )


def choose_longest_row(lengths: Lengths, data: DataSettings, validation: Validation) -> int:
    """Return the tokens of the row that memory is planned for, after telling them where no data are there."""
    longest_row = lengths.longest_row or data.max_length or max(lengths.train, default=USUAL_ROW_TOKENS)
    if lengths.longest_row is None:
        what = "rows of" if data.sequences_a_row == 1 else "pairs, with a prompt and an answer of"
        validation.add_findings("memory", "ok", [f"for {what} {longest_row} tokens, which data may stay below"])
    return longest_row


def plan_loading(
    job: Job, options: PlanOptions, validation: Validation
) -> "tuple[ModelPlan, Settings, Teacher | None, DrawnImages]":
    """Return how the model of a job would be loaded, the settings with what an earlier adapter tells, and a teacher.

    With them come images of the size that the options tell. Add what this machine's own GPU cannot do. Raises UserError
    where no GPU could load it.
    """
    settings, inputs = job.settings, job.inputs
    os.environ.update(build_library_variables(inputs, settings.model.chat_template_path, settings.output.push_to_hub))
    from llm_trainer.model import loading  # Transformers has to find the variables set
    from llm_trainer.model.plan import PlanSettings
    from llm_trainer.model.positions import bound_length

    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        settings = fetch_earlier_adapter(job, Path(scratch_dir)).settings
        folder = loading.fetch_model(inputs.model, settings.model, Path(scratch_dir), with_weights=False)
        parts = settings.model, settings.adapter, settings.parallelism, settings.output
        sections = PlanSettings(*parts, settings.data.trains_rewards)
        planned = plan_on_device(folder, sections, validation)
        teacher = read_teacher(job, planned.config, None, Path(scratch_dir))
        num_written = settings.methods.count_written(settings.data.method)
        data = bound_length(settings.data, planned.num_positions, num_written)
        settings = settings.model_copy(update={"data": data})
        return planned, settings, teacher, draw_images(options, planned, settings)


def draw_images(options: PlanOptions, planned: "ModelPlan", settings: Settings) -> "DrawnImages":
    """Return the images of a row as the options tell them.

    Raises UserError where the model or the settings take none, or the model's folder has no processor.
    """
    from llm_trainer.data.images.processing import ImageProcessing
    from llm_trainer.data.images.row_images import DrawnImages, draw_row_images
    from llm_trainer.model.kinds.auto_class import sees_images

    if options.images_per_row is None:
        return DrawnImages()
    given = f"--images-per-row={options.images_per_row}"
    if not sees_images(planned.config):
        raise UserError(f"{given} and the model takes texts alone: give an image-text model, or leave it out.")
    if settings.data.method not in IMAGE_METHODS:
        raise UserError(f"{given} with method={settings.data.method}, whose rows have no images: leave it out.")
    for name in ("packing", "streaming"):
        if settings.data.value(name):
            raise UserError(f"{given} with {name}=true, which takes no images: leave one of them out.")
    number, *size = map(int, options.images_per_row.split("x"))
    model = settings.model
    images = ImageProcessing(planned.folder, None, model.trust_remote_code, model.image_processor_options)
    return draw_row_images(number, (size[0], size[1]), images)


def plan_on_device(folder: str, sections: "PlanSettings", validation: Validation) -> "ModelPlan":
    """Return the plan for this machine's device, else for a GPU elsewhere: instances have GPUs that are not here.

    Raises UserError where neither can do what the settings ask for.
    """
    from llm_trainer.model.device import find_device
    from llm_trainer.model.memory.fit import ELSEWHERE
    from llm_trainer.model.plan import plan_model
    from llm_trainer.model.precision import choose_precision

    def plan_on(device: "Device") -> "ModelPlan":
        return plan_model(folder, sections, device, choose_precision(sections.model, sections.adapter, device))

    use_cpu = sections.parallelism.use_cpu
    try:
        device = find_device(use_cpu)
        return plan_on(device if use_cpu or device.is_gpu else ELSEWHERE)
    except UserError as error:
        if use_cpu:
            raise
        planned = plan_on(ELSEWHERE)
        validation.add_findings("here", "warning", error.problems)
        return planned


def plan_memory(models: Models, job: Job, longest_row: int, validation: Validation) -> "MemoryScenario | None":
    """Add what the job needs of GPUs, and return what was looked at, None where it is not known.

    What this machine's own GPUs lack is a warning: instances have others.
    """
    settings, environment = job.settings, job.environment
    here = Validation()
    scenario = examine_memory(models, settings, environment, longest_row, here)
    is_elsewhere = environment.num_gpus > 0 and not settings.parallelism.use_cpu
    validation.memory |= here.memory
    for finding in here.findings:
        lacks = is_elsewhere and finding.verdict == "error"
        validation.findings.append(replace(finding, subject="here", verdict="warning") if lacks else finding)
    if scenario is not None or not is_elsewhere:
        return scenario
    try:
        evaluates = bool(find_validation_sources(settings.data, environment)[0])
        return build_elsewhere(models, settings, longest_row, evaluates)
    except UserError as error:
        validation.add_findings("memory", "error", error.problems)
        return None


def measure_lengths(job: Job, options: PlanOptions, drawn: "DrawnImages", validation: Validation) -> Lengths:
    """Return the lengths of the rows that the options name, else of the data of the job where they are there."""
    if options.rows and options.tokens_per_row:
        validation.add_findings("options", "error", find_long_prompts(options.tokens_per_row, job.settings.data))
        num_sequences = options.rows * job.settings.data.sequences_a_row
        length = options.tokens_per_row + drawn.num_tokens
        return Lengths(Counter({length: num_sequences}), images=drawn.images)
    if drawn.images or not find_train_sources(job.settings.data, job.environment)[0]:
        return Lengths(images=drawn.images)
    inputs, problems = find_inputs(job.settings, job.environment)
    prepared = None if problems else tokenize_data(Job(job.environment, job.settings, inputs), validation)
    splits = prepared.splits if prepared else {}
    if not any(split.report.lengths for split in splits.values()):
        text = "The tokens of the data are not known (`validate` says why): give --rows and --tokens-per-row."
        validation.add_findings("data", "warning", [text])
        return Lengths()
    for name, split in splits.items():
        validation.add_findings(name, "ok", [f"{split.report.num_rows:,} rows, {split.report.num_tokens:,} tokens"])
    validated = splits["validation"].report.lengths if "validation" in splits else Counter[int]()
    longest_row = max(split.report.longest_row_tokens for split in splits.values())
    report = splits["train"].report
    images = prepared.images if prepared else None
    return Lengths(report.lengths, validated, longest_row, report.supervised_share, images)


def find_long_prompts(tokens_per_row: int, data: DataSettings) -> Iterator[str]:
    """Yield a sentence where prompts of so many tokens would all be left out."""
    if data.generates and data.max_length and tokens_per_row > data.max_length:
        yield (
            f"--tokens-per-row={tokens_per_row} is above max_length={data.max_length}, and longer prompts are left out "
            f"with method={data.method}: give at most {data.max_length}, or raise max_length."
        )


def tokenize_data(job: Job, validation: Validation) -> PreparedData | None:
    """Return the data of a job, tokenized as `validate` does; None where that is not possible."""
    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as folder, suppress(UserError, OSError):
        return prepare_data(job, Path(folder), Path(folder) / "rejected_rows.jsonl", validation)
    return None
