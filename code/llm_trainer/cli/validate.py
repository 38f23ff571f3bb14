# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer validate`: all that is wrong with a job, and what it would train on, without a GPU or weights.

Writes only what `train` writes at its start too: tokenized data into the cache, and rejected_rows.jsonl.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.gpu_memory import Models, examine_batch, examine_memory
from llm_trainer.cli.validation import Validation, collect_findings, print_validation
from llm_trainer.common.errors import UserError
from llm_trainer.config.checks import count_devices, find_missing_hardware, keep_valid
from llm_trainer.config.environment import Environment, read_environment
from llm_trainer.config.generation import GenerationSettings, choose_whole_groups, count_generated, count_group
from llm_trainer.config.schema import Settings, describe_settings
from llm_trainer.config.secret_references import VARIABLES, is_reference, read_secret_variables
from llm_trainer.config.teacher import derive_teacher
from llm_trainer.host.efa import inspect_efa
from llm_trainer.host.findings import Verdict
from llm_trainer.host.write_probe import find_write_problem
from llm_trainer.job.checkpoint_lock import find_other_job
from llm_trainer.job.disk_budget import BaseWeights, WriteSettings, inspect_disk_need
from llm_trainer.job.inputs import Inputs, check_model, find_inputs, find_warnings, list_missing_weights
from llm_trainer.job.job import Job, collect_settings, fetch_earlier_adapter, take_over_adapter
from llm_trainer.job.kept_checkpoints import find_damaged_checkpoint
from llm_trainer.job.model_objects import find_broken_objects
from llm_trainer.launcher.quick_imports import import_quickly, leave_out_bitsandbytes
from llm_trainer.launcher.user_script import names_a_script
from llm_trainer.launcher.worker_processes import build_library_variables
from llm_trainer.planning.prices import find_price_file, read_prices
from llm_trainer.planning.prices import find_warnings as find_price_warnings
from llm_trainer.readers.images import ImageRules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llm_trainer.config.sections import DataSettings
    from llm_trainer.data.encoding import Vocabulary
    from llm_trainer.data.images.row_images import RowImages
    from llm_trainer.data.splits import Split
    from llm_trainer.model.teacher.teacher import Teacher

# Arguments that depend on the GPUs of the job: rules of the hardware judge them.
GPU_ARGUMENTS = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "ddp_backend")


@dataclass(frozen=True)
class PreparedData:
    """The data of a job as they would be trained on, and the model's parts that this needed."""

    folder: str  # of the model
    settings: Settings  # with a max_length that the model can take
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    splits: "Mapping[str, Split]"
    problems: list[str]
    teacher: "Teacher | None"  # of a distillation
    images: "RowImages | None" = None  # of the row with the most, where rows have some


def validate(words: Sequence[str], as_json: bool) -> int:
    """Print what is found out about the job of the tree and of these words, and return the exit code.

    The code is 1 when the job would fail.
    """
    return print_validation(lambda in_colour: examine_job(words, in_colour), as_json)


def examine_job(words: Sequence[str], in_colour: bool) -> Validation:
    """Return what is known of the job of the tree, with the settings of these words. Sets environment variables."""
    return collect_findings(lambda validation: examine_tree(words, in_colour, validation))


def examine_tree(words: Sequence[str], in_colour: bool, validation: Validation) -> None:
    """Add what is known of the job of the tree, with the settings of these words. Sets environment variables."""
    try:
        environment = read_environment()
    except UserError as error:
        validation.add_findings("tree", "error", error.problems)
        return
    if names_a_script(environment.hyperparameters):
        text = "the job runs a script of your own, about which nothing can be checked."
        validation.add_findings("script", "warning", [text])
        return
    if environment.placement.told_by:
        validation.add_findings("launcher", "ok", [environment.placement.describe()])
    if environment.placement.warning:
        validation.add_findings("launcher", "warning", [environment.placement.warning])
    settings = examine_settings(environment, words, validation)
    inputs = examine_inputs(settings, environment, validation)
    job = take_over_adapter(Job(environment, settings, inputs))
    settings = job.settings
    examine_machine(settings, environment, validation)
    validation.add_findings("job", "warning", find_warnings(settings, environment, inputs))
    examine_prices(environment, validation)
    set_variables(settings, inputs, validation)
    sections = WriteSettings(settings.adapter, settings.training, settings.output)
    if not reads_base_from_hub(inputs):
        validation.findings += inspect_disk_need(sections, inputs, Path(os.environ["LLM_TRAINER_CACHE"]))
    if inputs.model and inputs.train and not any(find_broken_objects(Path(inputs.model))):
        models = (settings.model, settings.methods), settings.training.optim, inputs.model, inputs.teacher
        with leave_out_bitsandbytes(*models):
            examine_data(replace(job, settings=keep_valid(settings)), validation, in_colour)


def examine_machine(settings: Settings, environment: Environment, validation: Validation) -> None:
    """Add what the settings ask for and the machines do not have. A laptop says nothing of the GPUs of the job."""
    verdict: Verdict = "error" if environment.num_gpus else "warning"
    validation.add_findings("machine", verdict, find_missing_hardware(settings, environment))
    examine_batch(settings, environment, validation)
    efa = inspect_efa(environment, settings.parallelism.require_efa and not settings.parallelism.use_cpu)
    if efa.verdict != "ok":
        validation.findings.append(efa)


def examine_prices(environment: Environment, validation: Validation) -> None:
    """Add what is wrong with the prices of the channel `config`. A job trains without, and tells no cost."""
    try:
        file = find_price_file(environment.channels.get("config"))
        validation.add_findings("prices", "warning", find_price_warnings(read_prices(file), None) if file else [])
    except UserError as error:
        validation.add_findings("prices", "warning", error.problems)


def examine_settings(environment: Environment, words: Sequence[str], validation: Validation) -> Settings:
    """Return the settings as far as they are valid, after adding what is wrong with them."""
    settings, problems = collect_settings(environment, words)
    given = {name: value for name, value in describe_settings(settings).items() if settings.is_given(name)}
    validation.settings = given
    validation.add_findings("settings", "error", problems)
    if not problems:
        validation.add_findings("settings", "ok", [f"{len(given)} given"])
    return settings


def examine_inputs(settings: Settings, environment: Environment, validation: Validation) -> Inputs:
    """Return the job's model and data, after adding what they are and what is wrong with them."""
    inputs, problems = find_inputs(settings, environment, has_mistakes=bool(validation.list_texts("error")))
    validation.add_findings("inputs", "error", problems)
    if not problems:
        adapter = [f"adapter to go on from: {inputs.adapter}"] if inputs.adapter else []
        teacher = [f"teacher: {inputs.teacher}"] if inputs.teacher else []
        validation.add_findings("inputs", "ok", [inputs.model, *adapter, *teacher])
        validation.add_findings("inputs", "ok", [source.describe() for source in (*inputs.train, *inputs.validation)])
        is_alone = len(environment.hosts) == 1
        damaged = find_damaged_checkpoint(settings.training, inputs.checkpoint_dir, is_alone)
        validation.add_findings("checkpoints", "error", damaged)
    in_use = find_other_job(inputs.checkpoint_dir) if settings.training.use_checkpoints else None
    validation.add_findings("checkpoints", "error", [in_use] if in_use else [])
    missing = [f"{text} Only train needs them." for text in list_missing_weights(inputs)]
    validation.add_findings("weights", "warning", missing)
    return inputs


def set_variables(settings: Settings, inputs: Inputs, validation: Validation) -> None:
    """Set the environment variables that libraries read when they are imported, secrets among them."""
    try:
        os.environ.update(read_secret_variables(settings.secrets, os.environ))
    except UserError as error:  # this machine's role is another than the job's
        validation.add_findings("secrets", "warning", error.problems)
        for name in [name for name in VARIABLES if is_reference(os.environ.get(name, ""))]:
            del os.environ[name]  # the Hub answers nothing to a token that it does not know
    os.environ.update(build_library_variables(inputs, settings.model.chat_template_path, settings.output.push_to_hub))


def examine_data(job: Job, validation: Validation, in_colour: bool) -> None:
    """Prepare the data as the job would, and add what becomes of them, and a sample."""
    output_dir = job.environment.output_dir
    is_writable = find_write_problem(output_dir) is None
    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as folder:
        rejected_rows = Path(output_dir / "data" if is_writable else folder) / "rejected_rows.jsonl"
        try:
            job = fetch_earlier_adapter(job, Path(folder))
            examine_arguments(job, validation)
            prepared = prepare_data(job, Path(folder), rejected_rows, validation)
        except UserError as error:
            validation.add_findings("tokenizer", "error", error.problems)
            return
        except OSError as error:
            validation.add_findings("data", "error", [f"The data could not be prepared: {error}."])
            return
    from llm_trainer.data.preview import advise_weights, choose_sample  # after what imports quickly

    validation.add_findings("data", "error", prepared.problems)
    add_reports(prepared.splits, not prepared.problems, validation)
    if not prepared.problems:
        warnings = advise_weights(prepared.splits["train"].report, job.settings.methods)
        validation.add_findings("train", "warning", warnings)
        examine_rows(replace(job, settings=prepared.settings), prepared, validation)
        examine_side_files(prepared, job.settings, validation)
    datasets, rules = prepared.splits["train"].open_datasets(), ImageRules.from_settings(job.settings.data)
    if sample := choose_sample(datasets.values(), rules):
        validation.sample, validation.sample_name = sample.mark(prepared.tokenizer, in_colour), sample.name


def examine_rows(job: Job, prepared: PreparedData, validation: Validation) -> None:
    """Add what the lengths and the number of the rows mean for the model, for an epoch and for the memory of a GPU."""
    from llm_trainer.model.positions import find_length_warnings

    examine_epoch(job, prepared.splits["train"], validation)
    longest_row = max(report.longest_row_tokens for report in validation.reports.values())
    warnings = find_length_warnings(prepared.config, longest_row, job.settings.data.max_length)
    validation.add_findings("data", "warning", warnings)
    if not any(finding.subject == "model" and finding.verdict == "error" for finding in validation.findings):
        models = Models(prepared.config, prepared.teacher, prepared.images)
        examine_memory(models, job.settings, job.environment, longest_row, validation)


def prepare_data(job: Job, scratch_dir: Path, rejected_rows: Path, validation: Validation) -> PreparedData:
    """Return the tokenized data, after adding what is wrong with the model.

    Raises UserError for a model or a tokenizer that cannot be used, and OSError for files that cannot be written.
    """
    settings, inputs = job.settings, job.inputs
    with import_quickly(settings.model):
        from llm_trainer.data.images.row_images import find_row_images
        from llm_trainer.data.splits import prepare_splits
        from llm_trainer.model import loading  # Transformers has to find the variables set
        from llm_trainer.model.positions import count_positions
        from llm_trainer.model.quantization import find_quantization_problems

    folder = loading.fetch_model(inputs.model, settings.model, scratch_dir, with_weights=False)
    config = loading.read_config(folder, settings.model, settings.data.trains_rewards)
    sections = (settings.model, settings.adapter, settings.parallelism)
    validation.add_findings("model", "error", find_quantization_problems(folder, config, *sections))
    skeleton = examine_structure(folder, config, settings, validation)
    data = bound_rows(count_positions(skeleton) if skeleton else None, settings, validation)
    num_embeddings = config.get_text_config().vocab_size
    tokenizer = loading.load_tokenizer(folder, settings.model, num_embeddings, settings.data.trains_rewards)
    vocabulary = loading.build_vocabulary(folder, config, tokenizer, settings.model)
    if skeleton is not None and reads_base_from_hub(inputs):
        examine_download(job, folder, skeleton, validation)
    teacher = examine_teacher(job, vocabulary, config, scratch_dir, validation)
    splits, problems = prepare_splits(inputs, vocabulary, data, rejected_rows)
    bounded = settings.model_copy(update={"data": data})
    datasets = [rows for split in splits.values() for rows in split.open_datasets().values()]
    images = None if problems else find_row_images(datasets, vocabulary.images, data)
    return PreparedData(folder, bounded, config, tokenizer, splits, problems, teacher, images)


def examine_teacher(
    job: Job, vocabulary: "Vocabulary", config: "PreTrainedConfig", scratch_dir: Path, validation: Validation
) -> "Teacher | None":
    """Add whether the job's teacher fits the model of this config. Returns the teacher, None where none fits."""
    try:
        teacher = read_teacher(job, config, vocabulary.tokenizer.get_vocab(), scratch_dir)
    except UserError as error:
        validation.add_findings("teacher", "error", error.problems)
        return None
    validation.add_findings("teacher", "ok", [teacher.describe()] if teacher else [])
    return teacher


def read_teacher(
    job: Job, student: "PreTrainedConfig", words: "Mapping[str, int] | None", scratch_dir: Path
) -> "Teacher | None":
    """Return a job's teacher without its weights, None where it has none. Raises UserError for one that is unfit.

    `words` are the tokens of the student's tokenizer with their numbers. None: no tokenizer needs to be there.
    """
    from llm_trainer.model.teacher.teacher import StudentVocabulary, TeacherSource, fetch_teacher

    if not job.inputs.teacher:
        return None
    theirs = derive_teacher(job.settings.model, job.settings.methods, job.environment.channels)
    source = TeacherSource(job.inputs.teacher, theirs)
    return fetch_teacher(source, StudentVocabulary(student, words), scratch_dir, with_weights=False)


def bound_rows(num_positions: int | None, settings: Settings, validation: Validation) -> "DataSettings":
    """Return the settings of the data as the model's positions bound them, after adding what exceeds them."""
    from llm_trainer.model.positions import bound_length

    try:
        num_written = settings.methods.count_written(settings.data.method)
        return bound_length(settings.data, num_positions, num_written)
    except UserError as error:
        validation.add_findings("settings", "error", error.problems)
        return settings.data


def examine_arguments(job: Job, validation: Validation) -> None:
    """Add what keeps the training's arguments from being taken. Those of a GPU are left out where there is none."""
    settings, inputs = job.settings, job.inputs
    with import_quickly(settings.model):
        import torch

        from llm_trainer.training.methods import choose_method
        from llm_trainer.training.rehearsal import rehearse_step
        from llm_trainer.training.trainer_config import ArgumentSources, build_arguments

    given = {name: value for name, value in settings.given.items() if name not in GPU_ARGUMENTS}
    if settings.data.generates:  # the devices of the job may be others: `examine_batch` judges groups
        given |= choose_whole_groups(GenerationSettings(settings.data, settings.methods, settings.training))
    use_peft, has_validation = settings.adapter.use_peft, bool(inputs.validation)
    vision = settings.adapter.train_vision
    sources = ArgumentSources(given, settings.training, use_peft, has_validation, inputs.checkpoint_dir, vision)
    try:
        cpu = torch.device("cpu")
        rehearse_step(build_arguments(choose_method(settings.data.method), sources, cpu, torch.float32), cpu)
    except UserError as error:
        validation.add_findings("arguments", "error", error.problems)


def add_reports(splits: "Mapping[str, Split]", are_valid: bool, validation: Validation) -> None:
    """Add the report of each split: its formats, and if all splits are valid, what is odd about its rows."""
    from llm_trainer.data.preview import find_data_warnings

    for name, split in splits.items():
        validation.reports[name] = split.report
        formats = split.report.formats.items()
        texts = [f"{key}: {rows} rows, trained on: {split.report.loss_on[key]}" for key, rows in formats]
        validation.add_findings(name, "ok", texts)
        if are_valid:
            validation.add_findings(name, "warning", find_data_warnings(name, split.report))


def examine_epoch(job: Job, split: "Split", validation: Validation) -> None:
    """Add what leaves an epoch without rows or batches. It is not known where this host has only a part of the rows."""
    from llm_trainer.data.datasets import check_full_batch, open_epoch
    from llm_trainer.training.generation.prompts import find_prompt_problems
    from llm_trainer.training.packing import pack_split

    data, training, environment = job.settings.data, job.settings.training, job.environment
    if data.streaming or any(source.is_sharded for source in job.inputs.train):
        return
    num_devices = count_devices(job.settings.parallelism, environment)
    try:
        rows = open_epoch(split, data, training.seed)
        check_full_batch(len(rows), "rows", training, num_devices)
        if data.packing and training.dataloader_drop_last:
            with tempfile.TemporaryDirectory(prefix="llm-trainer-") as folder:
                num_sequences = len(pack_split(rows, data, Path(folder) / "train-packed.arrow"))
            check_full_batch(num_sequences, "sequences", training, num_devices)
        if data.generates:
            sections = GenerationSettings(data, job.settings.methods, training)
            at_once = count_generated(sections, num_devices), count_group(sections)
            problems = find_prompt_problems(rows, job.settings.methods, *at_once)
            validation.add_findings("data", "error", problems)
    except UserError as error:
        validation.add_findings("data", "error", error.problems)


def examine_side_files(prepared: PreparedData, settings: Settings, validation: Validation) -> None:
    """Add the files beside the weights that the result would lack, or that would be incomplete."""
    from llm_trainer.export.manifest import begin_manifest
    from llm_trainer.export.side_files import KnownParts, find_side_file_problems

    folder, known = Path(prepared.folder), begin_manifest(describe_settings(settings), validation.reports)
    parts = KnownParts(folder, prepared.config, prepared.tokenizer, settings.model, known)
    validation.add_findings("result", "warning", find_side_file_problems(parts))


def reads_base_from_hub(inputs: Inputs) -> bool:
    """Tell whether the job's model is to be downloaded from the Hub."""
    return bool(inputs.model) and not Path(inputs.model).is_dir()


def examine_download(job: Job, folder: str, skeleton: "PreTrainedModel", validation: Validation) -> None:
    """Add whether the disks have room for the weights on the Hub, and for what the job writes besides."""
    from huggingface_hub import constants

    from llm_trainer.common.hub import download_model, measure_weights

    settings, inputs = job.settings, job.inputs
    if not Path(folder).is_dir():  # each rank fetches the files by itself
        folder = download_model(inputs.model, settings.model.model_revision, with_weights=False)
    weights = measure_weights(inputs.model, Path(folder))
    if weights is None:
        return
    if problem := weights.find_lack_of_room():
        is_here = job.environment.num_gpus or settings.parallelism.use_cpu  # else a laptop, with another disk
        validation.add_findings("disk", "error" if is_here else "warning", [problem])
        return
    sections = WriteSettings(settings.adapter, settings.training, settings.output)
    shapes = [parameter.shape for parameter in skeleton.parameters()]
    base = BaseWeights(weights.whole_bytes, shapes, (Path(constants.HF_HUB_CACHE), weights.missing_bytes))
    validation.findings += inspect_disk_need(sections, inputs, Path(os.environ["LLM_TRAINER_CACHE"]), base)


def examine_structure(
    folder: str, config: "PreTrainedConfig", settings: Settings, validation: Validation
) -> "PreTrainedModel | None":
    """Add what keeps the model from being trained, and the adapter from being put on it or from being served.

    Returns the model without its weights, None where it cannot be built.
    """
    from llm_trainer.model.kinds.tower import check_tower, describe_tower
    from llm_trainer.model.loading import build_skeleton, check_fit

    skeleton = None
    try:
        if not any(check_model(folder)):  # else they are damaged, and told so among the inputs
            check_fit(folder, config, settings.model)
        skeleton = build_skeleton(folder, config, settings.model.trust_remote_code)
        check_tower(folder, skeleton, settings.adapter.train_vision)
        validation.add_findings("model", "ok", describe_tower(skeleton, settings.adapter.train_vision))
        examine_adapter(folder, skeleton, settings, validation)
    except UserError as error:
        validation.add_findings("model", "error", error.problems)
    return skeleton


def examine_adapter(folder: str, skeleton: "PreTrainedModel", settings: Settings, validation: Validation) -> None:
    """Add what an adapter on this model comes to. Raises UserError where it cannot be put on it."""
    from llm_trainer.model.plan import plan_adapter
    from llm_trainer.serving.limits import find_placement_refusals

    lora, lines = plan_adapter(folder, settings.model, settings.adapter, skeleton)
    validation.add_findings("adapter", "ok", lines)
    if lora is not None and not settings.output.merge_weights:
        refusals = find_placement_refusals(lora, skeleton.config.get_text_config().model_type)
        validation.add_findings("adapter", "warning", refusals)
