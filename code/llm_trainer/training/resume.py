# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a job goes on from: the same one on every host, and one of the same run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank, local_world_size, rank, world_size
from llm_trainer.data.report import DataReport
from llm_trainer.data.shard_exchange import send_file
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.checkpoint_dir import Gather, Marker
from llm_trainer.job.job import Job
from llm_trainer.training.packing import Packing

# What a checkpoint restores whatever the settings say, or what gives its step a meaning: it must not change.
OWN_SETTINGS = (
    *("use_peft", "torch_dtype", "max_length"),
    *("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_mxfp4"),
)
DATA_SETTINGS = ("assistant_only_loss", "completion_only_loss", "train_weights")
ADAPTER_SETTINGS = (
    *("lora_r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"),
    *("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"),
)
TRAINING_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed"),
    *("train_sampling_strategy", "shuffle_dataset", "truncation_mode"),
)


def identify_run(
    job: Job, arguments: SFTConfig, sharded: bool, model: str, report: DataReport, packing: Packing
) -> dict[str, Any]:
    """What two runs have in common of which one goes on where the other was interrupted; ready for JSON."""
    settings = job.settings
    names = OWN_SETTINGS + DATA_SETTINGS + (ADAPTER_SETTINGS if settings.adapter.use_peft else ())
    identity = {name: settings.value(name) for name in names}
    identity |= {name: getattr(arguments, name) for name in TRAINING_ARGUMENTS}
    identity |= {"packing": packing.mode, "packing_strategy": settings.data.packing_strategy}
    identity["distribution"] = "fsdp" if sharded else "ddp"  # their files are of different kinds
    identity["rows a step"] = (
        arguments.per_device_train_batch_size * world_size() * arguments.gradient_accumulation_steps
    )
    if settings.data.streaming:  # each rank, or process of a DataLoader, reads a stream of its own
        identity["streams"] = world_size() * max(1, settings.training.dataloader_num_workers)
    identity["model"] = hashlib.sha256((Path(model) / "config.json").read_bytes()).hexdigest()[:12]
    files = sorted(file.get("sha256") or f"{file['name']} {file['bytes']}" for file in report.files)
    identity["training data"] = f"{report.num_rows} rows {hashlib.sha256(''.join(files).encode()).hexdigest()[:12]}"
    return json.loads(json.dumps(identity, default=str))


def find_checkpoint(job: Job, run: dict[str, Any], group: dist.ProcessGroup | None) -> Path | None:
    """The checkpoint to go on from, whole on this host's disk, or None to start anew. Every rank must call this.

    It is judged by what all hosts have of it, and a host that lacks files gets them: of a sharded one each has but what
    its ranks wrote, and after a restart in place S3 sends nothing.
    Raises UserError for a checkpoint that is broken by name or belongs to another run.
    """
    checkpoint = choose_checkpoint(job, run, gather_over(group))
    if checkpoint is not None and group is not None:
        share(checkpoint, group)
    return checkpoint


def find_distribution(job: Job, group: dist.ProcessGroup | None) -> str | None:
    """How the run that this job may go on from was distributed; None where there is none. Every rank must call this.

    What is free on a GPU differs a little from start to start, and must not have a job refuse its own checkpoint.
    """
    if (
        not job.settings.training.use_checkpoints
        or (job.settings.training.resume_from_checkpoint or "").lower() == "false"
    ):
        return None
    gather = gather_over(group)
    for checkpoint in checkpoint_dir.list_over_hosts(job.inputs.checkpoint_dir, gather):
        marker = checkpoint_dir.agree_on_marker(checkpoint, gather)
        if marker is not None:
            return marker.run.get("distribution")
    return None


def gather_over(group: dist.ProcessGroup | None) -> Gather:
    def gather(own: Any) -> list[Any]:
        objects: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(objects, own, group=group)
        return objects

    return checkpoint_dir.gather_alone if group is None else gather


def choose_checkpoint(job: Job, run: dict[str, Any], gather: Gather = checkpoint_dir.gather_alone) -> Path | None:
    wish = job.settings.training.resume_from_checkpoint
    folder = job.inputs.checkpoint_dir
    if (not job.settings.training.use_checkpoints and wish is None) or (wish or "").lower() == "false":
        return None
    newest, warnings = checkpoint_dir.find_newest(folder, gather)
    if rank() == 0:
        for warning in warnings:
            print(warning, flush=True)
    if wish and wish.lower() != "true" and (newest is None or Path(wish).parent == folder):
        newest = check_named(Path(wish), gather)
    if newest is not None:
        check_run(newest, checkpoint_dir.agree_on_marker(newest, gather), run)
    return newest


def check_named(checkpoint: Path, gather: Gather) -> Path:
    """The checkpoint that the user names; one of another tool has no marker, and is taken as it is."""
    has_marker = checkpoint_dir.agree_on_marker(checkpoint, gather) is not None
    fault = checkpoint_dir.find_fault(checkpoint, gather) if has_marker else None
    if fault or not any(gather((checkpoint / TRAINER_STATE_NAME).is_file())):
        raise UserError(
            f"resume_from_checkpoint={str(checkpoint)!r} is not a complete checkpoint "
            f"({fault or f'it has no {TRAINER_STATE_NAME}'}): name another one, or leave it out to take the newest."
        )
    return checkpoint


def check_run(checkpoint: Path, marker: Marker | None, run: dict[str, Any]) -> None:
    """Refuse to go on from another run's checkpoint: what it restores would silently win over what was asked for."""
    if marker is None:
        return
    changes = [
        f"{name} was {marker.run[name]} and is {value}"
        for name, value in run.items()
        if name in marker.run and marker.run[name] != value
    ]
    if changes:
        raise UserError(
            f"{checkpoint} is a checkpoint of another run ({'; '.join(changes)}): change that back, "
            "empty the checkpoint folder or name another one with checkpoint_dir, "
            "or set resume_from_checkpoint=false to start anew."
        )


def share(checkpoint: Path, group: dist.ProcessGroup) -> None:
    """Send each host the files of a checkpoint that it lacks, from a host that has them. Every rank must call this.

    Each goes to its place when it is whole, and the marker last, so that a checkpoint on several hosts is never less
    than it was.
    """
    gather = gather_over(group)
    marker = checkpoint_dir.agree_on_marker(checkpoint, gather)
    if world_size() == local_world_size() or marker is None:  # each host has its own copy of what another tool wrote
        return
    faults = gather(checkpoint_dir.find_file_faults(checkpoint, marker))
    partial = checkpoint_dir.find_partial_dir(checkpoint.parent) / checkpoint.name
    for name in sorted(marker.files):
        sound = {
            place - place % local_world_size() for place, found in enumerate(faults) if found.get(name, "") is None
        }
        lacks_it = local_rank() == 0 and rank() not in sound
        if len(sound) < world_size() // local_world_size():
            send_file(checkpoint / name, partial / name if lacks_it else None, min(sound), group)
            if lacks_it:
                (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).replace(checkpoint / name)
    if local_rank() == 0 and checkpoint_dir.read_marker(checkpoint) != marker:
        checkpoint_dir.write_marker(checkpoint, marker)
    dist.barrier(group=group)
