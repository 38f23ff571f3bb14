# SPDX-License-Identifier: Apache-2.0
"""The SFTTrainer of a job. The only module that names TRL's and Transformers' training arguments."""

from typing import Any

import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from pydantic import SecretStr
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.ranks import world_size
from llm_trainer.config.schema import FIELDS, Settings
from llm_trainer.config.sft_config_fields import read_snapshot
from llm_trainer.job.inputs import Inputs
from llm_trainer.model.memory.fit import MemoryPlan
from llm_trainer.model.quantization import keep_adapter_in_float32
from llm_trainer.training import fsdp
from llm_trainer.training.packing import PackingCollator
from llm_trainer.training.resumable_trainer import ResumableTrainer

# Fields of SFTConfig that others act on: data.py, model.py, publish.py.
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
LORA_LEARNING_RATE = 2e-4  # ten times full fine-tuning's, as TRL's documentation advises for adapters
FULL_LEARNING_RATE = 2e-5


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    splits: dict[str, Dataset | IterableDataset],
    collator: PackingCollator | None,
    arguments: SFTConfig,
    settings: Settings,
) -> ResumableTrainer:
    """A trainer of tokenized data, which TRL's collator pads if there is no other.

    Raises UserError for a combination of arguments that TRL or PEFT refuses.
    """
    for config in (model.config.get_text_config(), model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id  # they have to agree, and Transformers would say so every time
    set_seed(arguments.seed)  # Transformers does so too, but after the adapter has drawn its first values
    if arguments.fsdp:
        fsdp.allow_cpu_ranks()
    try:
        trainer = ResumableTrainer(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=splits["train"],
            eval_dataset=splits.get("validation"),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"TRL refuses these settings: {quote_error(error)}.") from error
    trainer.loraplus_lr_ratio = settings.adapter.loraplus_lr_ratio
    if settings.adapter.use_peft:
        keep_adapter_in_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)
    if settings.training.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(settings.training.early_stopping_patience))
    return trainer


def build_arguments(
    settings: Settings,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    fit: MemoryPlan | None = None,
) -> SFTConfig:
    """SFTConfig from our defaults and every field of it that the user set, which wins.

    Without a fit, which is known once the data are, they serve to find mistakes early.
    """
    given = {
        name: reveal(settings.value(name))
        for name in read_snapshot()
        if name in FIELDS and name not in ACTED_ON and settings.is_given(name)
    }
    if isinstance(given.get("parallelism_config"), dict):
        given["parallelism_config"] = ParallelismConfig(**given["parallelism_config"])
    sharded = fit is not None and fit.sharded
    defaults = choose_defaults(settings, device, dtype, bool(inputs.validation), fit)
    values = {**defaults, **given}
    recomputes = values.pop("activation_checkpointing")
    try:
        arguments = SFTConfig(
            output_dir=str(inputs.checkpoint_dir),
            report_to="none",  # the reporter does it
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenized, cut and labelled already
            activation_checkpointing=recomputes and not sharded,
            **values,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"Transformers refuses these settings: {quote_error(error)}.") from error
    # Only now, as Transformers warns that layers are gathered once more in the backward pass: not those of FSDP2.
    arguments.activation_checkpointing = arguments.gradient_checkpointing = recomputes
    return arguments


def choose_defaults(
    settings: Settings, device: torch.device, dtype: torch.dtype, can_evaluate: bool, fit: MemoryPlan | None
) -> dict[str, Any]:
    """Where we choose otherwise than TRL."""
    on_cpu = device.type == "cpu"
    precision = not (settings.is_given("bf16") or settings.is_given("fp16"))
    defaults: dict[str, Any] = {
        "learning_rate": LORA_LEARNING_RATE if settings.adapter.use_peft else FULL_LEARNING_RATE,
        "bf16": precision and dtype == torch.bfloat16,
        "fp16": precision and dtype == torch.float16,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world_size() > 1 else None,
        "dataloader_pin_memory": not on_cpu,
        "activation_checkpointing": fit is not None and fit.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},  # the other kind loses gradients of frozen inputs
        "activation_offloading": fit is not None and fit.activation_offloading,
        "ddp_find_unused_parameters": False,  # the search costs a pass over the graph a step and finds nothing
        "disable_tqdm": True,  # its carriage returns spoil a log; metric lines show the progress
        "prediction_loss_only": True,
        "eval_strategy": "epoch" if can_evaluate else "no",
        "save_strategy": "no",  # SaveAndStop finds an interval
    }
    if fit is not None and fit.sharded:
        defaults |= fsdp.choose_arguments(settings)
    if settings.is_given("save_steps") and settings.training.use_checkpoints:
        defaults["save_strategy"] = "steps"
    if settings.is_given("eval_steps") and can_evaluate:
        defaults["eval_strategy"] = "steps"
    if settings.training.early_stopping:
        evaluates = settings.training.eval_strategy if settings.is_given("eval_strategy") else defaults["eval_strategy"]
        defaults |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "save_strategy": evaluates,
        }
        if settings.is_given("eval_steps"):
            defaults["save_steps"] = settings.training.eval_steps
    return defaults


def reveal(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value
