# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a job goes on from: the same one on every host, and one of the same run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from trl import SFTConfig

from llm_trainer import checkpoints
from llm_trainer.data_report import DataReport
from llm_trainer.distributed import local_rank, local_world_size, rank, world_size
from llm_trainer.errors import UserError
from llm_trainer.exchange import send_file
from llm_trainer.launch import Job
from llm_trainer.packing import Packing

# What a checkpoint restores whatever the settings say, or what gives its step a meaning: it must not change.
OWN_SETTINGS = ("use_peft", "load_in_4bit", "use_mxfp4", "torch_dtype", "max_length")
DATA_SETTINGS = ("assistant_only_loss", "completion_only_loss", "train_weights")
ADAPTER_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")
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
    names = OWN_SETTINGS + DATA_SETTINGS + (ADAPTER_SETTINGS if settings.use_peft else ())
    identity = {name: getattr(settings, name) for name in names}
    identity |= {name: getattr(arguments, name) for name in TRAINING_ARGUMENTS}
    identity |= {"packing": packing.mode, "packing_strategy": settings.packing_strategy}
    identity["distribution"] = "fsdp" if sharded else "ddp"  # their files are of different kinds
    identity["rows a step"] = (
        arguments.per_device_train_batch_size * world_size() * arguments.gradient_accumulation_steps
    )
    if settings.streaming:  # each rank, or process of a DataLoader, reads a stream of its own
        identity["streams"] = world_size() * max(1, settings.dataloader_num_workers)
    identity["model"] = hashlib.sha256((Path(model) / "config.json").read_bytes()).hexdigest()[:12]
    files = sorted(file.get("sha256") or f"{file['name']} {file['bytes']}" for file in report.files)
    identity["training data"] = f"{report.num_rows} rows {hashlib.sha256(''.join(files).encode()).hexdigest()[:12]}"
    return json.loads(json.dumps(identity, default=str))


def find_checkpoint(job: Job, run: dict[str, Any], group: dist.ProcessGroup | None) -> Path | None:
    """The checkpoint to go on from, on this host's disk, or None to start anew. Every rank must call this.

    Rank 0 decides; a host that lacks what rank 0 has gets it, as after a restart in place, when S3 sends nothing.
    Raises UserError for a checkpoint that is broken by name or belongs to another run.
    """
    choice: list[Path | None] = [choose_checkpoint(job, run) if rank() == 0 else None]
    if group is not None:
        dist.broadcast_object_list(choice, src=0, group=group)
        if choice[0] is not None:
            share(choice[0], group)
    return choice[0]


def choose_checkpoint(job: Job, run: dict[str, Any]) -> Path | None:
    wish = job.settings.resume_from_checkpoint
    folder = job.inputs.checkpoint_dir
    if (not job.settings.use_checkpoints and wish is None) or (wish or "").lower() == "false":
        return None
    newest, warnings = checkpoints.find_newest(folder)
    for warning in warnings:
        print(warning, flush=True)
    if wish and wish.lower() != "true" and (newest is None or Path(wish).parent == folder):
        newest = check_named(Path(wish))
    if newest is not None:
        check_run(newest, run)
    return newest


def check_named(checkpoint: Path) -> Path:
    """The checkpoint that the user names; one of another tool has no marker, and is taken as it is."""
    fault = checkpoints.find_fault(checkpoint) if checkpoints.read_marker(checkpoint) else None
    if fault or not (checkpoint / "trainer_state.json").is_file():
        raise UserError(
            f"resume_from_checkpoint={str(checkpoint)!r} is not a complete checkpoint "
            f"({fault or 'it has no trainer_state.json'}): name another one, or leave it out to take the newest."
        )
    return checkpoint


def check_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuse to go on from another run's checkpoint: what it restores would silently win over what was asked for."""
    marker = checkpoints.read_marker(checkpoint)
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
    """Copy rank 0's checkpoint to every host that does not have it."""
    mine = checkpoints.read_marker(checkpoint) if local_rank() == 0 else None
    markers: list[checkpoints.Marker | None] = [None] * world_size()
    dist.all_gather_object(markers, mine, group=group)
    hosts = range(0, world_size(), local_world_size())
    if all(markers[host] == markers[0] for host in hosts):
        return
    lacks_it = local_rank() == 0 and mine != markers[0]
    if lacks_it:
        checkpoints.clean(checkpoint.parent)
    partial = checkpoints.partial_dir(checkpoint.parent) / checkpoint.name
    names = [sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())]
    dist.broadcast_object_list(names, src=0, group=group)
    for name in names[0]:
        send_file(checkpoint / name, partial / name if lacks_it else None, 0, group)
    if lacks_it:
        checkpoints.move_into_place(partial)
        checkpoints.clean(checkpoint.parent)
    dist.barrier(group=group)
