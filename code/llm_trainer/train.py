# SPDX-License-Identifier: Apache-2.0
"""One worker, top to bottom: the story of a job. Read `train` first."""

from pathlib import Path

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from llm_trainer import adapters, data, export, model
from llm_trainer.distributed import rank, world_size
from llm_trainer.launch import Job
from llm_trainer.manifest import build_manifest
from llm_trainer.metrics import MetricLines
from llm_trainer.timeline import Timeline
from llm_trainer.trainer import build_arguments, build_trainer


def train(job: Job, scratch_dir: Path, timeline: Timeline) -> None:
    settings, inputs = job.settings, job.inputs
    transformers.utils.logging.disable_progress_bar()  # carriage returns spoil a log
    device, dtype = model.choose_device(settings), model.choose_dtype(settings)
    arguments = build_arguments(settings, inputs, device, dtype, can_evaluate=bool(inputs.validation_files))

    folder = model.fetch_model(inputs.model, settings, scratch_dir)
    quantization = model.build_quantization(folder, settings)
    tokenizer = model.load_tokenizer(folder, settings)
    timeline.mark("tokenizer")

    stop_ids = model.find_stop_ids(folder, tokenizer, settings)
    reports, splits = {}, {}
    for name, files in (("train", inputs.train_files), ("validation", inputs.validation_files)):
        if files:
            splits[name], reports[name] = data.load_split(name, files, tokenizer, stop_ids, settings, scratch_dir)
            say(f"Data {name}: {reports[name]}")
    timeline.mark("data")

    base = model.load_model(folder, settings, quantization, model.choose_weights_dtype(settings), device)
    timeline.mark("model")

    peft_config = adapters.build_lora(settings) if settings.use_peft else None
    trainer = build_trainer(
        base, tokenizer, peft_config, splits["train"], splits.get("validation"), arguments, settings
    )
    trainer.add_callback(MetricLines(timeline))
    describe_run(trainer)
    result = trainer.train(resume_from_checkpoint=find_checkpoint(job))
    timeline.mark("training")

    if rank() == 0:
        manifest = build_manifest(job, trainer, reports, result.metrics, timeline)
        export.export(trainer.model, tokenizer, folder, job, dtype, splits["train"], manifest)
    trainer.accelerator.wait_for_everyone()  # no host leaves while another still writes
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def find_checkpoint(job: Job) -> str | None:
    """The checkpoint that the user names, or the newest where use_checkpoints=true."""
    settings = job.settings
    if settings.resume_from_checkpoint and settings.resume_from_checkpoint.lower() not in ("true", "false"):
        return settings.resume_from_checkpoint
    wants_newest = settings.use_checkpoints or (settings.resume_from_checkpoint or "").lower() == "true"
    if not wants_newest or not job.inputs.checkpoint_dir.is_dir():
        return None
    return get_last_checkpoint(str(job.inputs.checkpoint_dir))


def describe_run(trainer: "transformers.Trainer") -> None:
    arguments = trainer.args
    per_device, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    say(
        f"Training {trainable:,} of {total:,} weights ({trainable / total:.2%}) on {world_size()} x "
        f"{arguments.device.type}; "
        f"global batch {per_device * world_size() * accumulation} rows "
        f"= {per_device} a device x {world_size()} devices x {accumulation} accumulation steps"
    )


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
