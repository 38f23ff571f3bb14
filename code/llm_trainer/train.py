# SPDX-License-Identifier: Apache-2.0
"""One worker, top to bottom: the story of a job. Read `train` first."""

import sys
from pathlib import Path

import datasets
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from llm_trainer.common.ranks import local_rank, rank, world_size
from llm_trainer.config.schema import Settings
from llm_trainer.data.datasets import Data, DataPlaces, load_data
from llm_trainer.data.fingerprints import describe_split
from llm_trainer.data.preview import log_data
from llm_trainer.data.streaming import AUDITED_ROWS
from llm_trainer.export.export import export
from llm_trainer.export.logits_check import choose_check_rows, compute_logits
from llm_trainer.export.manifest import build_manifest, describe_weights
from llm_trainer.export.result import Trained
from llm_trainer.job.job import Job
from llm_trainer.job.start_gate import StartGate
from llm_trainer.journal.journal import Journal
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model import loading, lora, lora_init
from llm_trainer.model.device import find_device
from llm_trainer.model.liger import apply_liger
from llm_trainer.model.memory.fit import MemoryPlan, choose_memory_plan, describe_memory_plan, find_target
from llm_trainer.model.memory.flops import find_peak_tokens_per_second, measure_row_tokens
from llm_trainer.model.memory.peak import Peak
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings
from llm_trainer.model.plan import ModelPlan, PlanSettings, plan_model
from llm_trainer.model.precision import choose_precision
from llm_trainer.training import fsdp
from llm_trainer.training.metric_lines import MetricLines
from llm_trainer.training.packing import Packing, choose_packing
from llm_trainer.training.packing_check import build_sibling
from llm_trainer.training.progress import follow
from llm_trainer.training.resumable_trainer import ResumableTrainer, SaveAndStop
from llm_trainer.training.resume import find_checkpoint, find_distribution, identify_run
from llm_trainer.training.sample_answers import Generations
from llm_trainer.training.stopping import Agreement, StopRequest
from llm_trainer.training.trainer_config import build_arguments, build_trainer


def train(job: Job, scratch_dir: Path, journal: Journal, timeline: Timeline) -> None:
    settings, inputs = job.settings, job.inputs
    transformers.utils.logging.disable_progress_bar()  # carriage returns spoil a log
    datasets.disable_progress_bars()
    device = find_device(settings.parallelism.use_cpu)
    precision = choose_precision(settings.model, settings.adapter, device)
    build_arguments(settings, inputs, device.torch, precision.compute)  # mistakes in them are told before all work
    request = StopRequest(scratch_dir / "stop", timeline.started, settings.training.max_run_seconds)
    agreement = Agreement()

    folder = loading.fetch_model(inputs.model, settings.model, scratch_dir)
    timeline.mark("download")
    plan = plan_model(
        folder, PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output), device, precision
    )
    say(*plan.reasons)
    tokenizer = loading.load_tokenizer(folder, settings.model)
    timeline.mark("tokenizer")

    vocabulary = loading.build_vocabulary(folder, plan.config, tokenizer, settings.model.model_revision)
    places = DataPlaces(inputs, job.environment, scratch_dir)
    data = load_data(places, vocabulary, settings.data, settings.training)
    tell_data(data, job, tokenizer, journal)
    timeline.mark("data")

    target = find_target(device, agreement.group)
    longest_row, earlier = data.find_longest_row_tokens(settings.data), find_distribution(job, agreement.group)
    sections = MemorySettings(settings.model, settings.adapter, settings.data, settings.training, settings.parallelism)
    fit = choose_memory_plan(MemoryScenario(plan.config, sections, longest_row, target, plan.attention.name), earlier)
    say(*describe_memory_plan(fit))
    arguments = build_arguments(settings, inputs, device.torch, precision.compute, fit)
    peak = Peak(device.torch)
    base = load_base(plan, fit, settings, arguments, agreement)
    timeline.mark("model")

    subject = build_sibling(base, device.torch) if fit.sharded else base
    packing = choose_packing(subject, tokenizer, arguments, settings, agreement.group)
    if packing.mode == "off" and not (settings.data.streaming or settings.is_given("train_sampling_strategy")):
        arguments.train_sampling_strategy = "group_by_length"
    say(f"{packing}; train_sampling_strategy={arguments.train_sampling_strategy}")
    sequences = packing.pack(data.splits, settings, scratch_dir)
    say(*(f"Data {name}: {packed}" for name, packed in packing.splits.items()))
    run = identify_run(job, arguments, fit.sharded, folder, data.reports["train"], packing)
    checkpoint = find_checkpoint(job, run, agreement.group)
    timeline.mark("packing")

    trainer = build_trainer(base, tokenizer, plan.lora, sequences, packing.collator, arguments, settings)
    if plan.lora is not None:
        trainer.adapter_start = lora_init.initialize_adapter(
            trainer.model, settings.adapter.init_lora_weights, folder, scratch_dir
        )
    trainer.agreement, trainer.run, trainer.keeps_checkpoints = agreement, run, settings.training.use_checkpoints
    trainer.journal = journal
    row_tokens = measure_row_tokens(data.reports["train"].lengths, settings.data.max_length)
    full_speed = (
        find_peak_tokens_per_second(fit.shape, plan.config, device, row_tokens)
        if arguments.bf16 or arguments.fp16
        else None
    )
    trainer.add_callback(MetricLines(trainer, timeline, journal, peak, full_speed))
    has_interval = settings.is_given("save_steps") or settings.is_given("save_strategy")
    trainer.add_callback(SaveAndStop(trainer, request, has_interval))
    describe_run(trainer, packing)
    journal.write("model", model=inputs.model, **describe_weights(trainer.model))
    generations = Generations(trainer, data, tokenizer, settings.tracking.sample_prompts, timeline)
    generations.before_training()
    say(f"Resuming from {checkpoint}" if checkpoint else "Starting from the base model")
    if checkpoint and trainer.adapter_start:
        lora_init.restore_initial_adapter(checkpoint, trainer.model, trainer.adapter_start)
    if local_rank() == 0:
        StartGate(scratch_dir).wait_or_pass()
    with follow(timeline.started, job.environment.num_billed_hosts) as progress:
        trainer.add_callback(progress)
        result = trainer.resume(checkpoint)
    agreement.settle()
    timeline.mark("training")

    memory = fit.compare(peak.read_bytes(), device.is_gpu)
    say(f"Memory: {memory['comparison']}")
    rows, logits = choose_check_rows(data.sample), None
    if trainer.stopped:
        describe_stop(trainer)
    elif fit.sharded or rank() == 0:
        logits = compute_logits(trainer.model, rows, device.torch)
    weights = fsdp.gather_weights(trainer.model) if fit.sharded else None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the other ranks leave while rank 0 exports, however long it takes

    if rank() == 0:
        if not trainer.stopped:
            generations.after_training()
        manifest = build_manifest(job, trainer, data.reports, packing, result.metrics, timeline, memory)
        export(Trained(job, plan, trainer, weights, rows, logits, tokenizer, scratch_dir, timeline), manifest)
        journal.write("manifest", **manifest)
        if trainer.stopped:
            say(f"Exported {request.age_seconds():.1f} s after the signal")
        elif settings.training.use_checkpoints:
            trainer.rotate()
        say(f"The job took {progress.count_instance_hours():.2f} instance-hours")


def tell_data(data: Data, job: Job, tokenizer: PreTrainedTokenizerBase, journal: Journal) -> None:
    if job.settings.data.streaming:
        say(f"Data train: streamed; what follows is of the first {AUDITED_ROWS} rows of each source")
    log_data(data, tokenizer, in_colour=sys.stdout.isatty())
    sources = {"train": job.inputs.train, "validation": job.inputs.validation}
    for split, report in data.reports.items():
        journal.write("data", **describe_split(split, report, sources[split]))


def load_base(
    plan: ModelPlan, fit: MemoryPlan, settings: Settings, arguments: SFTConfig, agreement: Agreement
) -> PreTrainedModel:
    if fit.sharded:
        base = fsdp.load_base(plan, settings, arguments, agreement.group)
    else:
        base = loading.load_model(plan.folder, settings.model, plan.load_options, plan.device.torch)
    if plan.liger.is_on:
        apply_liger(base, settings.model.liger_kernel_config or {})
    return base


def describe_stop(trainer: ResumableTrainer) -> None:
    say(
        f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}: all ranks agreed "
        f"{trainer.agreed_seconds:.1f} s after the signal, the checkpoint took {trainer.checkpoint_seconds:.1f} s"
    )


def describe_run(trainer: ResumableTrainer, packing: Packing) -> None:
    arguments = trainer.args
    per_device, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    trainable, total = lora.count_parameters(trainer.model)
    if isinstance(trainer.model, PeftModel):
        say(lora.describe_adapter(trainer.model))
    say(
        f"Training {trainable:,} of {total:,} weights ({trainable / total:.2%}) on {world_size()} x "
        f"{arguments.device.type}; "
        f"global batch {per_device * world_size() * accumulation} {packing.unit} "
        f"= {per_device} a device x {world_size()} devices x {accumulation} accumulation steps"
    )


def say(*lines: str) -> None:
    if rank() == 0:
        for line in lines:
            print(line, flush=True)
