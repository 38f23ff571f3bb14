# SPDX-License-Identifier: Apache-2.0
"""The trainer of a job, and its arguments. No other module names TRL's and Transformers' training arguments."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from pydantic import SecretStr
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.ranks import local_world_size, world_size
from llm_trainer.config.global_batch import PIECES
from llm_trainer.config.sections import METHOD_FIELDS, DataSettings, TrainingSettings
from llm_trainer.config.trl_config_fields import read_snapshot
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.model.config_file import drop_contradictions
from llm_trainer.model.kinds.tower import spare_gradients
from llm_trainer.model.layers.fused_adapters import fuse_adapters
from llm_trainer.model.lora import find_base_model
from llm_trainer.model.memory.fit import MemoryPlan
from llm_trainer.model.memory.shape import find_layer_list
from llm_trainer.model.precision import set_adapter_types
from llm_trainer.readers.images import ImageRules
from llm_trainer.training.methods import TrainingMethod
from llm_trainer.training.packing import PackingCollator
from llm_trainer.training.resumable import ResumableMixin, RunContext
from llm_trainer.training.sharding import fsdp

# Fields of TRL's configs that other modules act on. The trainer does not get them.
ACTED_ON = frozenset(
    {"output_dir", "max_length", "truncation_mode", "dataset_text_field", "assistant_only_loss"}
    | {"completion_only_loss", "model_init_kwargs", "chat_template_path", "pad_token", "trust_remote_code"}
    | {"resume_from_checkpoint", "report_to", "gradient_checkpointing"}
    | {"use_liger_kernel", "liger_kernel_config", "activation_offloading", "fsdp", "fsdp_config"}
    | {
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    }
    | {"packing", "packing_strategy", "padding_free", "eval_packing", "dataset_kwargs"}
)
RECOMPUTATION = {"use_reentrant": False}  # the other kind loses gradients of frozen inputs
MAX_IMAGE_WORKERS = 4  # processes of a device that process images, by default
ADAPTER_FACTOR = 10  # by which an adapter learns faster than all weights, as TRL's documentation advises


@dataclass(frozen=True)
class ArgumentSources:
    """Everything in a job that its training arguments are made of."""

    given: Mapping[str, Any]  # what the user set, by flat names
    training: TrainingSettings
    use_peft: bool
    has_validation: bool
    checkpoint_dir: Path
    leaves_idle: bool = False  # whether a batch may give some of the trained weights no gradient

    @property
    def batch(self) -> dict[str, int]:
        """The rows of a device and the accumulation, which a global batch derives."""
        return {name: self.training.value(name) for name in PIECES}


@dataclass(frozen=True)
class TrainerParts:
    """Everything that a trainer trains with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arguments: SFTConfig
    splits: dict[str, Dataset | IterableDataset]  # train, and validation if there is one
    collator: PackingCollator | ImageCollator | None  # None: TRL's, which pads
    lora: PeftConfig | None  # None for full fine-tuning
    kept_layers: int = 0  # the last so many keep their activations where others are recomputed


class KeepActivations(TrainerCallback):
    """A word to a model's last layers to keep their activations, after Transformers told all to recompute them."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Tell the last layers, and what is in them."""
        base = find_base_model(model)
        total = base.config.get_text_config().num_hidden_layers
        layers = model.get_submodule(find_layer_list(model, total))
        for module in (module for layer in layers[total - self.num_layers :] for module in layer.modules()):
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False


def build_trainer(method: TrainingMethod, parts: TrainerParts, run: RunContext, patience: int | None) -> ResumableMixin:
    """Return the trainer of tokenized data. It stops after `patience` evaluations without progress; None: never.

    Raises UserError for a combination of arguments that TRL or PEFT refuses.
    """
    check_columns(method, parts.splits["train"])
    prepare_config(parts.model, parts.tokenizer)
    set_seed(parts.arguments.seed)  # Transformers does so too, but after the adapter has drawn its first values
    if parts.arguments.fsdp:
        fsdp.allow_cpu_ranks()
    try:
        trainer = method.trainer_class(
            model=parts.model,
            args=parts.arguments,
            data_collator=parts.collator,
            train_dataset=parts.splits["train"],
            eval_dataset=parts.splits.get("validation"),
            processing_class=parts.tokenizer,
            peft_config=parts.lora,
            run=run,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"TRL refuses these settings: {quote_error(error)}.") from error
    if parts.lora is not None:
        fuse_adapters(set_adapter_types(trainer.model))
    spare_gradients(find_base_model(trainer.model))
    trainer.remove_callback(PrinterCallback)
    for callback in list_callbacks(parts.kept_layers, patience):
        trainer.add_callback(callback)
    return trainer


def build_image_collator(
    images: ImageProcessing | None,
    data: DataSettings,
    training: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
) -> ImageCollator | None:
    """Return what makes batches of rows with images, in processes beside the training; None where no row has any.

    The arguments get a number of these processes unless it is given.
    """
    if images is None:
        return None
    if not training.is_given("dataloader_num_workers"):
        cores = len(os.sched_getaffinity(0)) // local_world_size()
        arguments.dataloader_num_workers = min(MAX_IMAGE_WORKERS, cores)
        log.info(f"Images are processed in {arguments.dataloader_num_workers} processes a device")
    rules, is_sharded = ImageRules.from_settings(data), bool(arguments.fsdp)
    return ImageCollator(images, rules, tokenizer.pad_token_id, arguments.pad_to_multiple_of, is_sharded)


def list_callbacks(kept_layers: int, patience: int | None) -> Iterator[TrainerCallback]:
    """Yield the callbacks of a trainer that the settings ask for."""
    if kept_layers:
        yield KeepActivations(kept_layers)
    if patience is not None:
        yield EarlyStoppingCallback(patience)


def check_columns(method: TrainingMethod, rows: Dataset | IterableDataset) -> None:
    """Raise AssertionError where the rows are not those of the method. A stream may not know its columns."""
    columns = rows.column_names
    assert columns is None or set(method.columns) <= {*columns}, f"{method.name} needs rows with {method.columns}"


def share_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's configs the tokenizer's pad token. Transformers would warn at every start that they differ.

    The generation config keeps its tokens alone. Many published ones contradict themselves, and Transformers refuses to
    write a changed one of them into a checkpoint. A reward model has none.
    """
    pad = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = pad
    if not model.can_generate():
        return
    own = model.generation_config
    tokens = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "pad_token_id": pad}
    model.generation_config = GenerationConfig(**tokens)


def prepare_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Change what the model's config says to what its training needs."""
    dropped = drop_contradictions(model.generation_config) if model.can_generate() else []
    share_pad_token(model, tokenizer)
    name_experts(model)
    if dropped:
        log.info(
            f"The base's generation config contradicts itself in {', '.join(dropped)}: the training goes without, "
            "since Transformers would refuse to write checkpoints; a result of all weights has what the base has"
        )


def name_experts(model: PreTrainedModel) -> None:
    """Give the model's config the number of its experts by the name that TRL's loss reads, where it has another name.

    GraniteMoe and Phi-MoE say `num_local_experts`, and the loss that balances experts would end the first step.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        config.num_experts = config.num_local_experts


def join_cpu_ranks(device: torch.device, timeout_seconds: float) -> None:
    """Make the group of all ranks on CPUs: Transformers would make it without the setting ddp_timeout."""
    if device.type == "cpu" and world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))


def build_arguments(
    method: TrainingMethod,
    sources: ArgumentSources,
    device: torch.device,
    dtype: torch.dtype,
    memory_plan: MemoryPlan | None = None,
) -> SFTConfig:
    """Return the method's arguments from our defaults and every field of its config that the user set, which wins.

    The computation runs in `dtype`. The memory plan is known once the data are. Without it the arguments serve to find
    mistakes early. Raises UserError for values that Transformers refuses.
    """
    defaults = choose_method_defaults(method, sources, choose_defaults(sources, device, dtype, memory_plan))
    values = defaults | select_given(method.name, sources.given) | sources.batch
    recomputes = values.pop("activation_checkpointing")
    try:
        arguments = method.config_class(
            output_dir=str(sources.checkpoint_dir),
            report_to="none",  # the reporter does it
            activation_checkpointing=recomputes and not (memory_plan is not None and memory_plan.sharded),
            **method.fixed_arguments,
            **values,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"Transformers refuses these settings: {quote_error(error)}.") from error
    # Only now, as Transformers warns that layers are gathered once more in the backward pass: not those of FSDP2.
    arguments.activation_checkpointing = arguments.gradient_checkpointing = recomputes
    fsdp.reduce_in_float32(arguments)
    return arguments


def choose_method_defaults(
    method: TrainingMethod, sources: ArgumentSources, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a method whose defaults differ from TRL's. `defaults` are those of all methods."""
    chosen = {name: value for name, value in defaults.items() if name in read_snapshot(method.name)}
    chosen["learning_rate"] = method.learning_rate * (ADAPTER_FACTOR if sources.use_peft else 1)
    if "metric_for_best_model" in defaults:
        chosen["metric_for_best_model"] = method.best_metric
    return chosen | method.choose_defaults(sources.given, world_size())


def select_given(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among those that the user gave which the method's arguments take, as it takes them."""
    fields = {name: field for name, field in read_snapshot(method).items() if name in given and name not in ACTED_ON}
    selected = {name: reveal_secret(given[name]) for name in fields}
    for name in METHOD_FIELDS.keys() & selected.keys():
        if selected[name] is None and not fields[name].nullable:  # null asks for the default
            del selected[name]
    if isinstance(recomputation := selected.get("activation_checkpointing_kwargs"), dict):
        selected["activation_checkpointing_kwargs"] = RECOMPUTATION | recomputation
    if world_size() == 1:  # Accelerate would ask a group of processes that a single one has not
        selected.pop("ddp_backend", None)
    return selected


def choose_defaults(
    sources: ArgumentSources, device: torch.device, dtype: torch.dtype, memory_plan: MemoryPlan | None
) -> dict[str, Any]:
    """Return the arguments whose defaults differ from TRL's."""
    on_cpu = device.type == "cpu"
    leaves_precision = not {"bf16", "fp16"} & sources.given.keys()
    defaults: dict[str, Any] = {
        "bf16": leaves_precision and dtype == torch.bfloat16,
        "fp16": leaves_precision and dtype == torch.float16,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world_size() > 1 else None,
        "dataloader_pin_memory": not on_cpu,
        "activation_checkpointing": memory_plan is not None and memory_plan.gradient_checkpointing,
        "activation_checkpointing_kwargs": RECOMPUTATION,
        "activation_offloading": memory_plan is not None and memory_plan.activation_offloading,
        "ddp_broadcast_buffers": False,  # they are the checkpoint's on every rank, and no training moves them
        # The search costs a pass over the graph a step. It finds what a batch without images leaves out, else nothing.
        "ddp_find_unused_parameters": sources.leaves_idle,
        "disable_tqdm": True,  # its carriage returns spoil a log; metric lines show the progress
        "prediction_loss_only": True,
        "train_sampling_strategy": "random",  # KTO's config would keep the rows in their order
    }
    if memory_plan is not None and memory_plan.sharded:
        defaults |= fsdp.choose_arguments(sources.given.get("fsdp_config"))
    # From pinned memory batches are copied while the GPU computes, and nobody waits.
    copies_ahead = not on_cpu and sources.given.get("dataloader_pin_memory", True)
    defaults["accelerator_config"] = {"non_blocking": copies_ahead, **defaults.get("accelerator_config", {})}
    return defaults | choose_intervals(sources)


def choose_intervals(sources: ArgumentSources) -> dict[str, Any]:
    """Return when the trainer evaluates and saves by default."""
    given, training = sources.given, sources.training
    defaults: dict[str, Any] = {
        "eval_strategy": "epoch" if sources.has_validation else "no",
        "save_strategy": "no",  # SaveAndStop finds an interval
    }
    if "save_steps" in given and training.use_checkpoints:
        defaults["save_strategy"] = "steps"
    if "eval_steps" in given and sources.has_validation:
        defaults["eval_strategy"] = "steps"
    if training.save_strategy == "best":
        defaults["metric_for_best_model"] = "eval_loss"
    if training.early_stopping or training.load_best_model_at_end:
        defaults |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "save_strategy": given.get("eval_strategy", defaults["eval_strategy"]),
        }
        if "eval_steps" in given:
            defaults["save_steps"] = training.eval_steps
    return defaults


def reveal_secret(value: Any) -> Any:
    """Return a secret's text, and any other value as it is."""
    return value.get_secret_value() if isinstance(value, SecretStr) else value
