# SPDX-License-Identifier: Apache-2.0
"""The story of a job, as each of its workers lives it. Read `train` first, then its five phases in their order."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank, rank, world_size
from llm_trainer.common.safetensors_files import compute_sampled_digest
from llm_trainer.config.checks import count_usable_hosts
from llm_trainer.config.global_batch import describe_batch
from llm_trainer.config.schema import Settings, describe_settings
from llm_trainer.config.sections import AdapterSettings, MethodSettings
from llm_trainer.config.teacher import about_teacher, derive_teacher
from llm_trainer.data.datasets import Data, DataPlaces, check_full_batch, load_data
from llm_trainer.data.fingerprints import describe_split
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.data.images.row_images import find_row_images
from llm_trainer.data.preview import advise_weights, choose_sample, log_data
from llm_trainer.data.streaming import AUDITED_ROWS
from llm_trainer.export.export import finish_result, place_result, publish_result, warn_of_failure
from llm_trainer.export.logits_check import CheckRow, attempt_logits, choose_check_rows, compute_logits
from llm_trainer.export.manifest import Origin, TrainedRun, begin_manifest, build_manifest, describe_weights
from llm_trainer.export.result import ExportPlaces, ExportSettings, TrainingResult
from llm_trainer.export.side_files import KnownParts, find_side_file_problems
from llm_trainer.export.stop_watch import StopWatch
from llm_trainer.host.findings import log_findings
from llm_trainer.job.checkpoint_dir import parse_step
from llm_trainer.job.disk_budget import WriteSettings, inspect_disk_need
from llm_trainer.job.earlier_adapter import describe_lineage
from llm_trainer.job.inputs import Inputs
from llm_trainer.job.job import Job, fetch_earlier_adapter
from llm_trainer.job.start_gate import StartGate
from llm_trainer.journal.manifest import Manifest
from llm_trainer.journal.timeline import Timeline
from llm_trainer.merge.whole_model import merge_earlier_adapter
from llm_trainer.model import adapter_file, loading, lora, lora_init
from llm_trainer.model.device import find_device
from llm_trainer.model.kinds.text_pass import give_token_types
from llm_trainer.model.kinds.tower import freeze_tower
from llm_trainer.model.layers import float8
from llm_trainer.model.liger import apply_liger
from llm_trainer.model.memory.fit import MemoryPlan, choose_memory_plan, describe_memory_plan, find_target
from llm_trainer.model.memory.flops import find_peak_tokens_per_second
from llm_trainer.model.memory.global_batch import describe_fewer_hosts, split_global_batch
from llm_trainer.model.memory.peak import Peak
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings
from llm_trainer.model.plan import ModelPlan, PlanSettings, plan_model
from llm_trainer.model.positions import bound_length, find_length_warnings
from llm_trainer.model.precision import check_arguments, choose_precision
from llm_trainer.model.teacher.teacher import TeacherPlan, TeacherSource, load_teacher, prepare_teacher
from llm_trainer.planning.candidates import Outline
from llm_trainer.planning.comparison import (
    Figures,
    compare_with_plan,
    describe_comparison,
    find_host,
    read_prices_beside,
)
from llm_trainer.planning.fitting import Fit, Fitter
from llm_trainer.planning.learning import Learnt
from llm_trainer.planning.other_instances import add_other_instances
from llm_trainer.planning.workload import measure_work
from llm_trainer.readers.images import ImageRules
from llm_trainer.rewards.rewards import Reward, load_rewards
from llm_trainer.training.batches.run_batches import find_run_batches
from llm_trainer.training.generation.prompts import find_prompt_problems, list_columns
from llm_trainer.training.loss_check import check_loss, check_rewards
from llm_trainer.training.methods import TrainingMethod, choose_method
from llm_trainer.training.metric_lines import MetricLines
from llm_trainer.training.packing import Packing, choose_packing, examine_model
from llm_trainer.training.packing_check import build_proxy_model
from llm_trainer.training.progress import Progress, choose_progress
from llm_trainer.training.rehearsal import rehearse_step
from llm_trainer.training.resumable import ResumableMixin, RunContext
from llm_trainer.training.resume import (
    RunParts,
    find_checkpoint,
    find_distribution,
    find_saved_note,
    identify_run,
)
from llm_trainer.training.sample_answers import AnswerRules, SampleAnswers
from llm_trainer.training.save_and_stop import SaveAndStop
from llm_trainer.training.sharding import fsdp
from llm_trainer.training.stopping import StopConsensus, StopRequest
from llm_trainer.training.trainer_config import (
    ArgumentSources,
    TrainerParts,
    build_arguments,
    build_image_collator,
    build_trainer,
    join_cpu_ranks,
)

PLAN_BESIDE = "the plan beside what the job took"


@dataclass(frozen=True)
class Context:
    """The job, its folder for temporary files and its timeline, which all phases share."""

    job: Job
    scratch_dir: Path  # of this attempt, shared with the host's launcher and other workers
    timeline: Timeline

    @property
    def settings(self) -> Settings:
        """The job's settings."""
        return self.job.settings


@dataclass(frozen=True, eq=False)
class Prepared:
    """The result of the first phase: everything but the model's weights is read."""

    job: Job  # with a max_length that the model can take
    method: TrainingMethod
    model_plan: ModelPlan
    tokenizer: PreTrainedTokenizerBase
    data: Data
    stop_request: StopRequest
    consensus: StopConsensus
    origin: Origin
    teacher: TeacherPlan | None  # of a distillation


@dataclass(frozen=True, eq=False)
class Planned:
    """The result of the second phase: how the training fits its devices."""

    job: Job  # with the batches of a device
    scenario: MemoryScenario
    memory: MemoryPlan
    arguments: SFTConfig
    rewards: list[Reward]  # of a method whose model writes what it is trained on


@dataclass(frozen=True, eq=False)
class Built:
    """The result of the third phase: a trainer with its model and its rows."""

    scenario: MemoryScenario  # as it was planned
    memory: MemoryPlan
    trainer: ResumableMixin
    packing: Packing
    checkpoint: Path | None  # to go on from; None for a new run
    peak: Peak
    images: ImageCollator | None  # where rows have some

    @property
    def first_step(self) -> int:
        """The step after which this run begins."""
        return parse_step(self.checkpoint) if self.checkpoint else 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of the fourth phase: a trained model, and what was measured."""

    totals: dict[str, float]  # Transformers' metrics of the whole run
    measured_bytes: int  # the peak of the training
    answers: SampleAnswers
    progress: Progress
    weights: dict[str, torch.Tensor] | None  # on rank 0, where the model holds only shards
    check_rows: list[CheckRow]  # some rows of the training
    logits: list[torch.Tensor] | None  # of the trained model on these rows; None after a stop, and on other ranks
    unproven: str | None  # why they could not be computed


def train(job: Job, scratch_dir: Path, timeline: Timeline) -> None:
    """Train the model of a job and write the result. Every rank calls this.

    Raises UserError for what is wrong with settings, model or data.
    """
    disable_progress_bars()
    context = Context(fetch_earlier_adapter(job, scratch_dir), scratch_dir, timeline)
    prepared = prepare(context)
    context = replace(context, job=prepared.job)
    planned = plan(context, prepared)
    context = replace(context, job=planned.job)
    built = build(context, prepared, planned)
    outcome = run(context, prepared, planned, built)
    if rank() == 0:
        export(context, prepared, built, outcome)


def prepare(context: Context) -> Prepared:
    """Choose device and number types, fetch the model's files, and read tokenizer and data."""
    job, settings, timeline = context.job, context.settings, context.timeline
    method = choose_method(settings.data.method)
    device = find_device(settings.parallelism.use_cpu)
    precision = choose_precision(settings.model, settings.adapter, device)
    check_arguments(settings.training, device)
    # Built again when the data are known; here mistakes in them are told before all work, and the ranks meet.
    join_cpu_ranks(device.torch, settings.parallelism.ddp_timeout)
    rehearse_step(build_arguments(method, collect_argument_sources(job), device.torch, precision.compute), device.torch)
    stop_request = StopRequest(context.scratch_dir / "stop", timeline.started, settings.training.max_run_seconds)
    consensus = StopConsensus(settings.parallelism.ddp_timeout)

    folder = fetch_base(context)
    model_plan = plan_model(folder, collect_plan_settings(settings), device, precision)
    log.info(*model_plan.reasons)
    bounded = bound_length(settings.data, model_plan.num_positions, settings.methods.count_written(method.name))
    job = replace(job, settings=settings.model_copy(update={"data": bounded}))
    tokenizer = loading.load_tokenizer(folder, settings.model, model_plan.num_embeddings, model_plan.is_reward)
    theirs = derive_teacher(settings.model, settings.methods, job.environment.channels)
    teacher = prepare_teacher(TeacherSource(job.inputs.teacher, theirs), model_plan, tokenizer, context.scratch_dir)
    timeline.mark("tokenizer")

    data = read_data(replace(context, job=job), model_plan, tokenizer)
    warn_of_side_files(context, model_plan, tokenizer, data)
    timeline.mark("data")
    origin = describe_origin(job.inputs, job.settings.adapter, folder, teacher)
    return Prepared(job, method, model_plan, tokenizer, data, stop_request, consensus, origin, teacher)


def fetch_base(context: Context) -> str:
    """Return the folder of the base's files, with the earlier adapter merged into them where that is asked for."""
    model, adapter = context.settings.model, context.settings.adapter
    folder = loading.fetch_model(context.job.inputs.model, model, context.scratch_dir)
    report_disk_need(context, folder)
    context.timeline.mark("download")
    if adapter.merge_adapter:
        folder = merge_earlier_adapter(Path(folder), model, adapter, context.scratch_dir)
        context.timeline.mark("merge")
    return folder


def collect_plan_settings(settings: Settings) -> PlanSettings:
    """Return the settings that the plan of the model is made of."""
    parts = settings.model, settings.adapter, settings.parallelism, settings.output
    return PlanSettings(*parts, settings.data.trains_rewards)


def start_rewards(
    methods: MethodSettings, channels: Mapping[str, Path], data: Data, arguments: SFTConfig
) -> list[Reward]:
    """Return the rewards of this rank, each with its process; none where rows are no prompts.

    Raises UserError for columns that the rows lack, and for too few rows.
    """
    if not data.reports["train"].has_prompts:
        return []
    rows, seconds = data.splits["train"], methods.reward_timeout_seconds
    if problems := [*find_prompt_problems(rows, methods, arguments.generation_batch_size, arguments.num_generations)]:
        raise UserError(*problems)
    columns = list_columns(rows)
    return load_rewards(methods.reward_functions, methods.reward_options, channels, seconds, columns)


def report_disk_need(context: Context, folder: str) -> None:
    """Log whether the disks have room for what the job writes, which is known once a Hub model's files are there."""
    if folder == context.job.inputs.model:  # told before
        return
    inputs = replace(context.job.inputs, model=folder)
    sections = WriteSettings(context.settings.adapter, context.settings.training, context.settings.output)
    log_findings(inspect_disk_need(sections, inputs, Path(os.environ["LLM_TRAINER_CACHE"])))


def plan(context: Context, prepared: Prepared) -> Planned:
    """Choose how the training fits the memory of its devices, and its arguments. Nothing is loaded yet."""
    settings, model_plan, group = context.settings, prepared.model_plan, prepared.consensus.group
    target = find_target(model_plan.device, group)
    longest_row = prepared.data.find_longest_row_tokens(settings.data)
    earlier = find_distribution(settings.training, context.job.inputs.checkpoint_dir, group)
    work = settings.data, settings.training, settings.parallelism, settings.methods
    sections = MemorySettings(settings.model, settings.adapter, *work)
    kernels = model_plan.attention.name, model_plan.liger.kernels
    evaluates = bool(context.job.inputs.validation)
    job_parts = model_plan.config, sections, longest_row, target, *kernels, evaluates
    teacher = prepared.teacher.teacher if prepared.teacher else None
    images = find_row_images(prepared.data.list_datasets(), prepared.data.images, settings.data)
    scenario = split_global_batch(MemoryScenario(*job_parts, teacher=teacher, images=images))
    memory = choose_memory_plan(scenario, earlier)
    log.info(*describe_memory_plan(memory))
    if shortage := describe_fewer_hosts(scenario, count_usable_hosts(settings, context.job.environment)):
        log.warning(shortage)
    job = replace(context.job, settings=settings.model_copy(update={"training": scenario.settings.training}))
    device, dtype = model_plan.device.torch, model_plan.precision.compute
    sources = replace(collect_argument_sources(job), leaves_idle=model_plan.leaves_idle)
    arguments = build_arguments(prepared.method, sources, device, dtype, memory)
    rewards = start_rewards(settings.methods, context.job.environment.channels, prepared.data, arguments)
    return Planned(job, scenario, memory, arguments, rewards)


def build(context: Context, prepared: Prepared, planned: Planned) -> Built:
    """Load the base, pack the rows, find the checkpoint to go on from, and build the trainer."""
    settings, model_plan, consensus = context.settings, prepared.model_plan, prepared.consensus
    peak = Peak(model_plan.device.torch)
    base = load_base(context, prepared, planned)
    teacher = load_teacher(prepared.teacher, model_plan.device.torch) if prepared.teacher else None
    context.timeline.mark("model")

    packing, splits = pack_rows(context, prepared, planned, (base, teacher))
    identity = identify_run(describe_run_parts(context, prepared, planned, packing), planned.arguments)
    checkpoint_dir = context.job.inputs.checkpoint_dir
    saved = find_saved_note(context.scratch_dir)
    checkpoint = find_checkpoint(settings.training, checkpoint_dir, identity, consensus.group, saved)
    context.timeline.mark("packing")

    model, kept_layers = (base, prepared.tokenizer, planned.arguments), planned.memory.kept_layers
    rules = settings.data, settings.training
    images = build_image_collator(prepared.data.images, *rules, prepared.tokenizer, planned.arguments)
    parts = TrainerParts(*model, splits, images or packing.collator, model_plan.lora, kept_layers)
    run_context = replace(build_run_context(context, prepared, planned.rewards, identity), teacher=teacher)
    patience = settings.training.early_stopping_patience if settings.training.early_stopping else None
    trainer = build_trainer(prepared.method, parts, run_context, patience)
    give_first_values(trainer, settings.adapter, model_plan.folder)
    if model_plan.float8_layers:
        log.info(float8.convert_base(trainer.model, model_plan.float8_layers))
    check_trained_loss(context, prepared, planned, trainer)
    add_callbacks(context, prepared, planned, trainer, peak)
    return Built(planned.scenario, planned.memory, trainer, packing, checkpoint, peak, images)


def run(context: Context, prepared: Prepared, planned: Planned, built: Built) -> Outcome:
    """Train, and take from the trained model what the export needs while all ranks are there."""
    trainer, timeline = built.trainer, context.timeline
    describe_run(trainer, built.packing)
    check_rows = choose_check_rows(prepared.data.sample, built.images)  # while its images are there for sure
    timeline.journal.write("model", model=context.job.inputs.model, **describe_weights(trainer.model))
    num_prompts = 0 if context.settings.data.trains_rewards else context.settings.tracking.sample_prompts
    rules = AnswerRules(num_prompts, built.images)
    answers = SampleAnswers(trainer, prepared.data, prepared.tokenizer, rules, timeline)
    answers.before_training()
    beginning = describe_beginning(context.job.inputs, context.settings.adapter.merge_adapter)
    log.info(f"Resuming from {built.checkpoint}" if built.checkpoint else beginning)
    if built.checkpoint and trainer.run.adapter_start:
        lora_init.restore_initial_adapter(built.checkpoint, trainer.model, trainer.run.adapter_start)
    if local_rank() == 0:
        StartGate(context.scratch_dir).wait_or_pass()
    with choose_progress(timeline.started, context.job.environment.num_billed_hosts) as progress:
        trainer.add_callback(progress)
        totals = trainer.train_from(built.checkpoint).metrics
    prepared.consensus.finish()
    timeline.mark("training")

    measured_bytes = built.peak.read_bytes()
    logits, unproven = compute_expected(trainer, check_rows, prepared.model_plan.device.torch, planned.memory.sharded)
    weights = fsdp.gather_weights(trainer.model) if planned.memory.sharded else None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the other ranks leave while rank 0 exports, however long it takes
    return Outcome(totals, measured_bytes, answers, progress, weights, check_rows, logits, unproven)


def export(context: Context, prepared: Prepared, built: Built, outcome: Outcome) -> None:
    """Write the result, prove it and publish it. Only rank 0 calls this."""
    trainer, journal = built.trainer, context.timeline.journal
    with StopWatch(prepared.stop_request.file, trainer.stopped) as watch:
        result = collect_result(context, prepared, built, outcome, watch)
        placed = place_result(result)
        manifest = build_manifest(trainer, describe_trained_run(context, prepared, built, outcome))
        with warn_of_failure(PLAN_BESIDE, placed.path):
            watch.attempt(PLAN_BESIDE, lambda: compare_run(context, prepared, built, outcome, manifest))
        if outcome.answers.prompts:
            with warn_of_failure("The answers after the training", placed.path):
                watch.attempt("the answers after the training", outcome.answers.after_training)
        finish_result(result, placed, manifest)
        journal.write("manifest", **manifest)
        if context.settings.training.use_checkpoints and not trainer.stopped:
            trainer.rotate_checkpoints()
        publish_result(result)
    if watch.is_stopped:
        log.info(f"Exported {prepared.stop_request.age_seconds():.1f} s after the signal")
    log.info(f"The job took {outcome.progress.count_instance_hours():.2f} instance-hours")
    warn_of_gaps(context, placed.path, manifest["export"], watch)


def warn_of_gaps(context: Context, folder: Path, export: dict[str, Any], watch: StopWatch) -> None:
    """Write to the journal what a stop has left out, and tell last of all that a result is not proven."""
    texts = list(watch.left_out)  # logged already
    if not (export["proven"] or watch.is_stopped):
        texts.append(f"The result in {folder} is whole, and not proven: {export['reason']}.")
        log.warning(texts[-1])
    for text in texts:
        context.timeline.journal.write("event", level="warning", text=text, host=context.timeline.host)


def disable_progress_bars() -> None:
    """Switch the libraries' progress bars off: their carriage returns spoil a log."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def collect_argument_sources(job: Job) -> ArgumentSources:
    """Return what the training arguments are made of."""
    return ArgumentSources(
        given=job.settings.given,
        training=job.settings.training,
        use_peft=job.settings.adapter.use_peft,
        has_validation=bool(job.inputs.validation),
        checkpoint_dir=job.inputs.checkpoint_dir,
    )


def read_data(context: Context, model_plan: ModelPlan, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Return the rows as tokens, after telling what they are. Raises UserError with everything that is wrong."""
    settings, job = context.settings, context.job
    vocabulary = loading.build_vocabulary(model_plan.folder, model_plan.config, tokenizer, settings.model)
    places = DataPlaces(job.inputs, job.environment, context.scratch_dir)
    data = load_data(places, vocabulary, settings.data, settings.training)
    report_data(context, data, tokenizer)
    longest_row = data.find_longest_row_tokens(settings.data)
    for text in find_length_warnings(model_plan.config, longest_row, settings.data.max_length):
        log.warning(text)
    return data


def report_data(context: Context, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    """Describe the data in the log and in the journal."""
    inputs = context.job.inputs
    if context.settings.data.streaming:
        log.info(f"Data train: streamed; what follows is of the first {AUDITED_ROWS} rows of each source")
    sample = choose_sample([data.sample], ImageRules.from_settings(context.settings.data))
    assert sample is not None, "a split without rows has been refused"
    log_data(data, sample, tokenizer, in_colour=sys.stdout.isatty())
    for text in advise_weights(data.reports["train"], context.settings.methods):
        log.warning(text)
    sources = {"train": inputs.train, "validation": inputs.validation}
    for split, report in data.reports.items():
        shown = sample.describe(tokenizer) if split == "train" else {}
        context.timeline.journal.write("data", **describe_split(split, report, sources[split]), **shown)


def warn_of_side_files(context: Context, plan: ModelPlan, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Warn of the files beside the weights that the result would lack, or that would be incomplete."""
    if rank() > 0:
        return
    settings = context.settings
    known = begin_manifest(describe_settings(settings), data.reports)
    parts = KnownParts(Path(plan.folder), plan.config, tokenizer, settings.model, known)
    for problem in find_side_file_problems(parts):
        log.warning(problem)


def load_base(context: Context, prepared: Prepared, planned: Planned) -> PreTrainedModel:
    """Return the base model, on this rank's device, or where it can be sharded from. Every rank calls this."""
    model, model_plan = context.settings.model, prepared.model_plan
    if model_plan.is_reward:
        set_seed(planned.arguments.seed)  # a new head is the same on every rank and in every attempt
    if planned.memory.sharded:
        group = prepared.consensus.group
        base = fsdp.load_base_for_sharding(model_plan, model, planned.arguments, group)
    else:
        device = model_plan.device.torch
        base = loading.load_model(model_plan.folder, model, model_plan.load_options, device)
    if not context.settings.adapter.train_vision:
        freeze_tower(base)
    give_token_types(base, model_plan.token_types)
    if model_plan.liger.is_on:
        apply_liger(base, model_plan.liger.collect_options(model))
    return base


def pack_rows(
    context: Context, prepared: Prepared, planned: Planned, models: tuple[PreTrainedModel, PreTrainedModel | None]
) -> tuple[Packing, dict[str, Dataset | IterableDataset]]:
    """Choose the packing, and the order of rows that are padded. Return it with the splits to train on and evaluate.

    `models` are the base and its teacher, if there is one.
    """
    base, teacher = models
    settings, arguments, device = context.settings, planned.arguments, prepared.model_plan.device.torch
    group = prepared.consensus.group
    if prepared.data.images is not None:
        packing = Packing("off", "rows have images")  # packing=true was refused with the data
    else:
        subject = build_proxy_model(base, device) if planned.memory.sharded else base
        packing = choose_packing(subject, prepared.tokenizer, arguments, settings.data, group)
    if teacher is not None:
        packing = examine_model(packing, teacher, arguments, settings.data, group)
    orders_itself = settings.data.streaming or settings.data.generates
    if packing.mode == "off" and not (orders_itself or settings.is_given("train_sampling_strategy")):
        arguments.train_sampling_strategy = "group_by_length"
    log.info(f"{packing}; train_sampling_strategy={arguments.train_sampling_strategy}")
    splits = packing.pack(prepared.data.splits, settings.data, settings.training.seed, context.scratch_dir)
    log.info(*(f"Data {name}: {packed}" for name, packed in packing.splits.items()))
    if "train" in packing.splits:
        num_sequences = packing.splits["train"].num_sequences
        check_full_batch(num_sequences, packing.unit, settings.training, world_size())
    return packing, splits


def describe_run_parts(context: Context, prepared: Prepared, planned: Planned, packing: Packing) -> RunParts:
    """Return the parts of the run's identity besides its training arguments."""
    settings, lineage = context.settings, prepared.origin.lineage
    return RunParts(
        model=settings.model,
        adapter=settings.adapter,
        data=settings.data,
        base=prepared.model_plan.folder,
        train_report=prepared.data.reports["train"],
        packing=packing,
        sharded=planned.memory.sharded,
        earlier_adapter=lineage[0]["sha256"] if lineage else None,
        teacher=prepared.origin.teacher,
        rewards=[reward.choice for reward in planned.rewards],
    )


def give_first_values(trainer: ResumableMixin, settings: AdapterSettings, base_folder: str) -> None:
    """Give an adapter the values that it begins with, where these are not PEFT's. Every rank calls this."""
    if trainer.run.adapter_start is not None:
        init = settings.init_lora_weights
        lora_init.initialize_adapter(trainer.model, init, base_folder, trainer.run.adapter_start)
    if trainer.run.goes_on:
        adapter_file.load_trained_values(trainer.model, settings)


def check_trained_loss(context: Context, prepared: Prepared, planned: Planned, trainer: ResumableMixin) -> None:
    """Raise UserError for a model that the loss would train wrongly. LLM.int8() rounds a batch's tokens together."""
    plan, methods, data = prepared.model_plan, context.settings.methods, context.settings.data
    check = check_rewards if plan.is_reward else check_loss
    if data.generates:  # whose logits are divided by it
        check = partial(check_loss, temperature=methods.find_value("temperature", data.method))
    if not (planned.memory.sharded or context.settings.model.load_in_8bit):
        check(trainer.model, plan.num_embeddings, plan.device.torch, plan.precision.compute)
    if trainer.run.teacher is not None and not methods.teacher_load_in_8bit:
        with about_teacher():
            check_loss(trainer.run.teacher, plan.num_embeddings, plan.device.torch, plan.precision.compute)


def build_run_context(
    context: Context, prepared: Prepared, rewards: list[Reward], identity: dict[str, Any]
) -> RunContext:
    """Return what the trainer needs to know of the job."""
    training, adapter = context.settings.training, context.settings.adapter
    init = adapter.init_lora_weights
    return RunContext(
        consensus=prepared.consensus,
        identity=identity,
        journal=context.timeline.journal,
        saves_checkpoints=training.use_checkpoints,
        has_logging_interval=training.is_given("logging_steps"),
        loraplus_lr_ratio=adapter.loraplus_lr_ratio,
        adapter_start=lora_init.find_adapter_start(init, context.scratch_dir) if adapter.use_peft else None,
        goes_on=adapter.goes_on,
        base_digest=prepared.origin.base_digest,
        rewards=rewards,
        stop_request=prepared.stop_request,
        saved=find_saved_note(context.scratch_dir),
    )


def add_callbacks(context: Context, prepared: Prepared, planned: Planned, trainer: ResumableMixin, peak: Peak) -> None:
    """Have the trainer show its metrics, save checkpoints and obey a stop."""
    settings, arguments = context.settings, planned.arguments
    peak_speed = None
    if arguments.bf16 or arguments.fp16:
        peak_speed = find_peak_tokens_per_second(planned.scenario, prepared.data.reports["train"].lengths)
    trainer.add_callback(MetricLines(trainer, prepared.method, context.timeline, peak, peak_speed))
    has_interval = settings.is_given("save_steps") or settings.is_given("save_strategy")
    trainer.add_callback(SaveAndStop(trainer, prepared.stop_request, has_interval))


def compute_expected(
    trainer: ResumableMixin, rows: list[CheckRow], device: torch.device, is_sharded: bool
) -> tuple[list[torch.Tensor] | None, str | None]:
    """Return the trained model's logits on rows, and why they could not be computed.

    Both are None after a stop, which leaves no time, and on ranks that need not compute.
    """
    if trainer.stopped:
        describe_stop(trainer)
    elif is_sharded:  # a rank that went on alone after a failure would leave the others waiting
        return compute_logits(trainer.model, rows, device), None
    elif rank() == 0:
        return attempt_logits(trainer.model, rows, device)
    return None, None


def describe_trained_run(context: Context, prepared: Prepared, built: Built, outcome: Outcome) -> TrainedRun:
    """Return the run as its manifest describes it."""
    return TrainedRun(
        model=context.job.inputs.model,
        origin=prepared.origin,
        settings=describe_settings(context.settings),
        streaming=context.settings.data.streaming,
        reports=prepared.data.reports,
        packing=built.packing,
        memory=built.memory.compare(built.memory.estimate, outcome.measured_bytes),
        totals=outcome.totals,
        phase_seconds=context.timeline.seconds,
    )


def compare_run(context: Context, prepared: Prepared, built: Built, outcome: Outcome, manifest: Manifest) -> None:
    """Add what was planned beside what the job took up to its export to its manifest, after telling it in the log."""
    batches = find_run_batches(built.trainer, built.first_step, prepared.data.reports["train"].supervised_share)
    expected = built.memory.expect_peak(built.scenario, batches.largest if batches else ())
    manifest["memory"] = built.memory.compare(expected, outcome.measured_bytes)
    log.info(f"Memory: {manifest['memory']['comparison']}")
    timeline, environment, step_seconds = context.timeline, context.job.environment, outcome.progress.step_seconds
    count = len(environment.hosts)
    host = find_host(environment.instance_type, prepared.model_plan.device, world_size() // count)
    # Completions may end long before the plan has them end, from which --learn would learn nothing.
    if host is None or expected is None or context.settings.data.generates:
        return
    start = sum(seconds for phase, seconds in timeline.seconds.items() if phase != "training")
    hours = sum(timeline.seconds.values()) / 3600
    actual = Figures(outcome.measured_bytes, step_seconds, start - (step_seconds or 0.0), hours)
    scenario = replace(built.scenario, known_batch=batches.typical if batches else None)
    fit = Fit(scenario, built.memory.parallelism, expected, fits=True)
    outline = outline_run(context, prepared, built)
    compared = manifest["planned_and_actual"] = compare_with_plan(outline, host, count, fit, actual)
    if compared:
        log.info(describe_comparison(compared))
        add_other_instances(outline, manifest)


def outline_run(context: Context, prepared: Prepared, built: Built) -> Outline:
    """Return the job as it is planned."""
    reports, channels = prepared.data.reports, context.job.environment.channels
    eval_lengths = reports["validation"].lengths if "validation" in reports else {}
    lengths, share = reports["train"].lengths, reports["train"].supervised_share
    # Lengths are empty where rows are streamed and none has come.
    work = measure_work(lengths, eval_lengths, built.scenario.settings.generation, share) if lengths else None
    prices = read_prices_beside(channels.get("config"))
    return Outline(Fitter(built.scenario), work, context.settings.output.merge_weights, Learnt(), prices)


def describe_origin(inputs: Inputs, adapter: AdapterSettings, base_folder: str, teacher: TeacherPlan | None) -> Origin:
    """Return what the training begins with, read while its files are there for sure."""
    folder = adapter.adapter_path
    lineage = describe_lineage(inputs.adapter, Path(folder)) if folder else []
    return Origin(compute_sampled_digest(Path(base_folder)), lineage, teacher.teacher.identity if teacher else None)


def collect_result(
    context: Context, prepared: Prepared, built: Built, outcome: Outcome, watch: StopWatch
) -> TrainingResult:
    """Return everything that the export needs."""
    settings, inputs, output_dir = context.settings, context.job.inputs, context.job.environment.output_dir
    return TrainingResult(
        settings=ExportSettings(settings.model, settings.adapter, settings.data, settings.tracking, settings.output),
        places=ExportPlaces(inputs.model_dir, output_dir, context.scratch_dir),
        base_name=inputs.model,
        plan=prepared.model_plan,
        trainer=built.trainer,
        weights=outcome.weights,
        rows=outcome.check_rows,
        logits=outcome.logits,
        unproven=outcome.unproven,
        tokenizer=prepared.tokenizer,
        timeline=context.timeline,
        watch=watch,
    )


def describe_run(trainer: ResumableMixin, packing: Packing) -> None:
    """Log what is trained, on which devices, with which batch."""
    arguments = trainer.args
    per_device, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    trainable, total = lora.count_parameters(trainer.model)
    if isinstance(trainer.model, PeftModel):
        log.info(lora.describe_adapter(trainer.model))
    log.info(
        f"Training {trainable:,} of {total:,} weights ({trainable / total:.2%}) on {world_size()} x "
        f"{arguments.device.type}; {describe_batch(per_device, world_size(), accumulation, packing.unit)}"
    )


def describe_beginning(inputs: Inputs, is_merged: bool) -> str:
    """Return a line for the log on what a new run begins with. `is_merged` tells of the earlier adapter."""
    if not inputs.adapter:
        return "Starting from the base model"
    if is_merged:
        return f"Starting from the base model with the adapter {inputs.adapter} merged into it"
    return f"Starting from the adapter {inputs.adapter}, with a new optimizer"


def describe_stop(trainer: ResumableMixin) -> None:
    """Log where the training stopped, and how long that took."""
    log.info(
        f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}: all ranks agreed "
        f"{trainer.agreed_seconds:.1f} s after the signal, the checkpoint took {trainer.checkpoint_seconds:.1f} s"
    )
