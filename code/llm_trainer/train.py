# SPDX-License-Identifier: Apache-2.0
"""One worker, top to bottom: the story of a job. Read `train` first."""

import sys
from pathlib import Path

import datasets
import torch
import transformers

from llm_trainer import adapters, export, model
from llm_trainer.audit import describe_data
from llm_trainer.data import load_data
from llm_trainer.distributed import rank, world_size
from llm_trainer.findings import show_bytes
from llm_trainer.fit import Fit, choose_fit, find_target
from llm_trainer.launch import Job
from llm_trainer.manifest import build_manifest
from llm_trainer.metrics import MetricLines
from llm_trainer.packing import Packing, choose_packing
from llm_trainer.peak import Peak
from llm_trainer.resumable_trainer import SaveAndStop
from llm_trainer.resume import find_checkpoint, identify_run
from llm_trainer.settings import is_given
from llm_trainer.stopping import Agreement, StopRequest
from llm_trainer.streaming import AUDITED_ROWS
from llm_trainer.timeline import Timeline
from llm_trainer.trainer import build_arguments, build_trainer


def train(job: Job, scratch_dir: Path, timeline: Timeline) -> None:
    settings, inputs = job.settings, job.inputs
    transformers.utils.logging.disable_progress_bar()  # carriage returns spoil a log
    datasets.disable_progress_bars()
    device, dtype = model.choose_device(settings), model.choose_dtype(settings)
    arguments = build_arguments(settings, inputs, device, dtype, can_evaluate=bool(inputs.validation))
    request = StopRequest(scratch_dir / "stop", timeline.started, settings.max_run_seconds)
    agreement = Agreement()

    folder = model.fetch_model(inputs.model, settings, scratch_dir)
    quantization = model.build_quantization(folder, settings)
    tokenizer = model.load_tokenizer(folder, settings)
    timeline.mark("tokenizer")

    data = load_data(job, model.read_vocabulary(folder, tokenizer, settings), scratch_dir)
    if settings.streaming:
        say(f"Data train: streamed; what follows is of the first {AUDITED_ROWS} rows of each source")
    for line in describe_data(data, tokenizer, in_colour=sys.stdout.isatty()):
        say(line)
    timeline.mark("data")

    longest_row = settings.max_length if settings.streaming else None
    longest_row = longest_row or max(report.longest_row_tokens for report in data.reports.values())
    fit = choose_fit(model.read_config(folder, settings), settings, longest_row, find_target(device, agreement.group))
    describe_fit(fit)
    arguments = build_arguments(settings, inputs, device, dtype, bool(inputs.validation), fit)
    timeline.mark("memory")

    peak = Peak(device)
    base = model.load_model(folder, settings, quantization, model.choose_weights_dtype(settings), device)
    timeline.mark("model")

    packing = choose_packing(base, tokenizer, arguments, settings, agreement.group)
    if packing.mode == "off" and not (settings.streaming or is_given(settings, "train_sampling_strategy")):
        arguments.train_sampling_strategy = "group_by_length"
    say(f"{packing}; train_sampling_strategy={arguments.train_sampling_strategy}")
    sequences = packing.pack(data.splits, settings, scratch_dir)
    for name, packed in packing.splits.items():
        say(f"Data {name}: {packed}")
    run = identify_run(job, arguments, folder, data.reports["train"], packing)
    checkpoint = find_checkpoint(job, run, agreement.group)
    timeline.mark("packing")

    peft_config = adapters.build_lora(settings) if settings.use_peft else None
    trainer = build_trainer(base, tokenizer, peft_config, sequences, packing.collator, arguments, settings)
    trainer.agreement, trainer.run, trainer.keeps_checkpoints = agreement, run, settings.use_checkpoints
    has_interval = is_given(settings, "save_steps") or is_given(settings, "save_strategy")
    trainer.add_callback(MetricLines(timeline))
    trainer.add_callback(SaveAndStop(trainer, request, has_interval))
    describe_run(trainer, packing)
    say(f"Resuming from {checkpoint}" if checkpoint else "Starting from the base model")
    result = trainer.resume(checkpoint)
    agreement.settle()
    timeline.mark("training")
    measured_bytes = peak.read_bytes()
    if fit.estimate:  # a CPU's resident set shows what the allocator holds too
        expected_bytes = fit.estimate.peak_bytes if device.type == "cuda" else fit.estimate.total_bytes
        say(f"Memory: estimated {show_bytes(expected_bytes)}, measured peak {show_bytes(measured_bytes)}")
    if trainer.stopped:
        say(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}: all ranks agreed "
            f"{trainer.agreed_seconds:.1f} s after the signal, the checkpoint took {trainer.checkpoint_seconds:.1f} s"
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the other ranks leave while rank 0 exports, however long it takes

    if rank() == 0:
        memory = {**fit.describe(), "measured_peak_bytes": measured_bytes}
        manifest = build_manifest(job, trainer, data.reports, packing, result.metrics, timeline, memory)
        merges = settings.merge_weights and not trainer.stopped  # a merge may take longer than the platform waits
        export.export(trainer.model, tokenizer, folder, job, dtype, data.sample, manifest, merges)
        if trainer.stopped:
            say(f"Exported {request.age_seconds():.1f} s after the signal")
        elif settings.use_checkpoints:
            trainer.rotate()


def describe_fit(fit: Fit) -> None:
    say(f"Memory: {fit.reason}")
    for line in fit.estimate.as_table() if fit.estimate else ():
        say(line)
    if fit.warning:
        say(f"Warning: {fit.warning}")


def describe_run(trainer: "transformers.Trainer", packing: Packing) -> None:
    arguments = trainer.args
    per_device, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    say(
        f"Training {trainable:,} of {total:,} weights ({trainable / total:.2%}) on {world_size()} x "
        f"{arguments.device.type}; "
        f"global batch {per_device * world_size() * accumulation} {packing.unit} "
        f"= {per_device} a device x {world_size()} devices x {accumulation} accumulation steps"
    )


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
