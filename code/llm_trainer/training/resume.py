# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a job goes on from: the same one on every host, and one of the same run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from trl import SFTConfig

from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank, local_world_size, rank, world_size
from llm_trainer.config.sections import (
    METHOD_FIELDS,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    TrainingSettings,
)
from llm_trainer.data.report import DataReport
from llm_trainer.data.shard_exchange import send_file
from llm_trainer.job import checkpoint_dir
from llm_trainer.job.checkpoint_dir import Gather, Marker
from llm_trainer.job.kept_checkpoints import explain_fault, find_state_fault, goes_on
from llm_trainer.rewards.choice import Choice
from llm_trainer.training.packing import Packing

# Settings and arguments that a checkpoint restores whatever the user says, or that give its step a meaning.
OWN_SETTINGS = (
    *("use_peft", "torch_dtype", "max_length", "train_vision", "image_processor_options"),
    *("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_mxfp4"),
    "base_compute",
)
DATA_SETTINGS = ("assistant_only_loss", "completion_only_loss", "train_weights")
ADAPTER_SETTINGS = (
    *("lora_r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"),
    *("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"),
)
# Settings of a method that something else in the identity tells: what is in the folder, wherever that lies.
TOLD_BY_CONTENT = ("teacher_model_name_or_path", "teacher_model_revision")
# A run that goes on may differ in these. They tell it how the checkpoint was written.
FREE = ("distribution",)
DERIVED = ("steps_per_generation",)  # from the accumulation, which differs on other devices
TRAINING_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed"),
    *("train_sampling_strategy", "shuffle_dataset", "truncation_mode"),
)


@dataclass(frozen=True)
class RunParts:
    """The parts of a run's identity besides its training arguments."""

    model: ModelSettings
    adapter: AdapterSettings
    data: DataSettings
    base: str  # folder of the model's files
    train_report: DataReport
    packing: Packing
    sharded: bool
    earlier_adapter: str | None = None  # digest of the adapter that the training goes on from
    teacher: str | None = None  # digest of the teacher, and how it is rounded
    rewards: Sequence[Choice] = ()  # of completions, with the schemas that their options name

    def value(self, name: str) -> Any:
        """Return the setting of that name."""
        sections = (self.model, self.adapter, self.data)
        return next(section.value(name) for section in sections if name in type(section).model_fields)


def identify_run(parts: RunParts, arguments: SFTConfig) -> dict[str, Any]:
    """Return the identity of a run, ready for JSON: a run that goes on from its checkpoints has to have the same."""
    names = OWN_SETTINGS + DATA_SETTINGS + (ADAPTER_SETTINGS if parts.adapter.use_peft else ())
    identity = {name: parts.value(name) for name in names}
    identity |= {name: getattr(arguments, name) for name in TRAINING_ARGUMENTS if hasattr(arguments, name)}
    if parts.data.method != "sft":  # checkpoints of earlier versions know no method
        own = [name for name, methods in METHOD_FIELDS.items() if parts.data.method in methods]
        own = [name for name in own if name not in (*TOLD_BY_CONTENT, *DERIVED)]
        identity |= {"method": parts.data.method, **{name: getattr(arguments, name) for name in own}}
    if parts.rewards:
        identity["reward_functions"] = [reward.describe_content() for reward in parts.rewards]
        identity["reward_options"] = {reward.entry: reward.options for reward in parts.rewards if reward.options}
    identity |= {"packing": parts.packing.mode, "packing_strategy": parts.data.packing_strategy}
    identity["distribution"] = "fsdp" if parts.sharded else "ddp"
    identity["rows a step"] = (
        arguments.per_device_train_batch_size * world_size() * arguments.gradient_accumulation_steps
    )
    if parts.data.streaming:  # each rank, or process of a DataLoader, reads a stream of its own
        identity["streams"] = world_size() * max(1, arguments.dataloader_num_workers)
    identity["model"] = hashlib.sha256((Path(parts.base) / "config.json").read_bytes()).hexdigest()[:12]
    identity["earlier adapter"] = describe_adapter(parts.earlier_adapter, parts.adapter.merge_adapter)
    if parts.teacher is not None:
        identity["teacher"] = parts.teacher
    report = parts.train_report
    files = sorted(file.get("sha256") or f"{file['name']} {file['bytes']}" for file in report.files)
    digest = hashlib.sha256("".join(files).encode(errors="backslashreplace")).hexdigest()[:12]  # a name may be no UTF-8
    identity["training data"] = f"{report.num_rows} rows {digest}"
    return json.loads(json.dumps(identity, default=str))


def describe_adapter(digest: str | None, is_merged: bool) -> str | None:
    """Return what tells an earlier adapter from others, None without one."""
    merged = ", merged" if is_merged else ""
    return digest and f"{digest[:12]}{merged}"


def find_saved_note(scratch_dir: Path) -> Path:
    """Return the file by which the next attempt on this host knows that the job has saved a checkpoint."""
    return scratch_dir / "saved"


def find_checkpoint(
    settings: TrainingSettings, folder: Path, identity: dict[str, Any], group: dist.ProcessGroup | None, saved: Path
) -> Path | None:
    """Return the checkpoint of the folder to go on from, whole on this host's disk, or None to start anew.

    It is judged by the files that all hosts have of it, and a host that lacks files gets them. Each host has only what
    its ranks wrote of a sharded one, and S3 sends nothing after a restart in place. Every rank must call this.
    `saved` is the note of the attempts before this one. Raises UserError where they saved and nothing whole is left.
    The same for a checkpoint that is broken and asked for by name, or belongs to another run.
    """
    gather = make_gather(group)
    checkpoint = choose_checkpoint(settings, folder, identity, gather)
    if checkpoint is None and goes_on(settings) and any(gather(saved.exists())):
        raise UserError(
            f"The checkpoints of this job are gone: no whole one is in {folder} of the hosts that are left. Set "
            "checkpoint_dir to a folder that all hosts share, so that others can go on from it, and start the job "
            "again."
        )
    if checkpoint is not None:
        saved.touch()
    if checkpoint is not None and group is not None:
        share_files(checkpoint, group)
    return checkpoint


def find_distribution(settings: TrainingSettings, folder: Path, group: dist.ProcessGroup | None) -> str | None:
    """Return how the run that this job may go on from was distributed, such as "fsdp"; None where there is none.

    The free memory of a GPU differs a little from start to start, and a job must not refuse its own checkpoint for
    that. Every rank must call this.
    """
    if not settings.use_checkpoints or (settings.resume_from_checkpoint or "").lower() == "false":
        return None
    gather = make_gather(group)
    for checkpoint in checkpoint_dir.list_over_hosts(folder, gather):
        marker = checkpoint_dir.agree_on_marker(checkpoint, gather)
        if marker is not None:
            return marker.run.get("distribution")
    return None


def make_gather(group: dist.ProcessGroup | None) -> Gather:
    """Return a function that gathers every rank's object; of this process alone where there is no group."""

    def gather(own: Any) -> list[Any]:
        objects: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(objects, own, group=group)
        return objects

    return checkpoint_dir.gather_alone if group is None else gather


def choose_checkpoint(
    settings: TrainingSettings, folder: Path, identity: dict[str, Any], gather: Gather = checkpoint_dir.gather_alone
) -> Path | None:
    """Return the checkpoint that the settings ask for: one by name, the newest complete one, or None.

    Raises UserError for one that is broken and asked for by name, or belongs to another run.
    """
    if not goes_on(settings):
        return None
    newest, warnings = checkpoint_dir.find_newest(folder, gather)
    log.info(*warnings)
    wish = settings.resume_from_checkpoint
    if wish and wish.lower() != "true" and (newest is None or Path(wish).parent == folder):
        newest = check_named(Path(wish), gather)
    if newest is not None:
        check_run(newest, checkpoint_dir.agree_on_marker(newest, gather), identity)
    return newest


def check_named(checkpoint: Path, gather: Gather) -> Path:
    """Return the checkpoint that the user names. One of another tool has no marker, and is taken as it is.

    Raises UserError where it is not complete.
    """
    has_marker = checkpoint_dir.agree_on_marker(checkpoint, gather) is not None
    fault = checkpoint_dir.find_fault(checkpoint, gather) if has_marker else None
    state_faults = gather(find_state_fault(checkpoint))
    if fault or None not in state_faults:
        raise UserError(explain_fault(checkpoint, fault or state_faults[0]))
    return checkpoint


def check_run(checkpoint: Path, marker: Marker | None, identity: dict[str, Any]) -> None:
    """Raise UserError for another run's checkpoint: its values would silently win over those that are asked for."""
    if marker is None:
        return
    changes = [
        f"{name} was {marker.run[name]} and is {value}"
        for name, value in identity.items()
        if name in marker.run and name not in FREE and marker.run[name] != value
    ]
    if changes:
        raise UserError(
            f"{checkpoint} is a checkpoint of another run ({'; '.join(changes)}): change that back, "
            "empty the checkpoint folder or name another one with checkpoint_dir, "
            "or set resume_from_checkpoint=false to start anew."
        )


def share_files(checkpoint: Path, group: dist.ProcessGroup) -> None:
    """Send each host the files of a checkpoint that it lacks, from a host that has them. Every rank must call this.

    Each file goes to its place when it is whole, and the marker last. A checkpoint on several hosts is never less than
    it was.
    """
    gather = make_gather(group)
    marker = checkpoint_dir.agree_on_marker(checkpoint, gather)
    if world_size() == local_world_size() or marker is None:  # each host has its own copy of another tool's checkpoint
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
