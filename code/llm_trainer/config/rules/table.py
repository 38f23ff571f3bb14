# SPDX-License-Identifier: Apache-2.0
"""The table of rules: settings that are each valid, and contradict each other.

The rules are told in the order of the table. In their conditions, `s` stands for the settings of the job.
"""

import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from llm_trainer.common.metric_definitions import list_objectives
from llm_trainer.common.redaction import hide_secrets
from llm_trainer.config.global_batch import TOTALS, show_nearest
from llm_trainer.config.rules.distillation import DISTILLATION_RULES
from llm_trainer.config.rules.generation import GENERATION_RULES
from llm_trainer.config.rules.methods import METHOD_RULES
from llm_trainer.config.rules.rule import Rule
from llm_trainer.config.schema import FIELDS, Settings
from llm_trainer.config.secret_references import USED_FOR
from llm_trainer.config.sections import ADDRESS, HUB_ID, MOVING_STARTS, AdapterSettings, ModelSettings
from llm_trainer.config.tracker_choice import (
    TRACKERS,
    choose_trackers,
    find_mlflow_uri,
    has_wandb_account,
    is_mlflow_address,
    list_named_trackers,
)
from llm_trainer.config.tracker_names import find_refused_names
from llm_trainer.config.trl_config_fields import read_snapshot

# These settings ask for an adapter of a certain kind. Sizes such as lora_r do not: a recipe may hold them and switch
# the adapter off.
ADAPTER_CHOICES = (
    "target_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
)
# An adapter that began so cannot be told apart from its base once both are sharded.
UNSHARDABLE_STARTS = (*MOVING_STARTS, "loftq")
OWN_PARAMETER_GROUPS = ("galore", "lomo", "adalomo", "apollo")  # these optimizers do not take the trainer's groups
# Options of Transformers' from_pretrained that this project sets itself, and the settings to use in their place.
SETTING_OF_MODEL_OPTION = {
    "attn_implementation": "attn_implementation",
    "dtype": "torch_dtype",
    "torch_dtype": "torch_dtype",
    "quantization_config": "load_in_4bit, load_in_8bit or use_mxfp4",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
}
# Options of from_pretrained with which it would load other files than are checked, proven and merged, run other code
# than the image's, or return something else than a model.
UNSAFE_MODEL_OPTIONS = (
    *("adapter_kwargs", "config", "gguf_file", "ignore_mismatched_sizes", "key_mapping", "state_dict", "subfolder"),
    *("use_safetensors", "variant", "weights_only"),
    *("allow_all_kernels", "fusion_config", "kernel_config", "use_kernels"),
    *("device_map", "device_mesh", "distributed_config", "output_loading_info", "tp_plan", "tp_size"),
)
# Keys of fsdp_config that a user may set. Checkpoints, loading and export rely on all the others.
REFINABLE = frozenset({"reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"})
OTHER_WAYS = {
    "activation_checkpointing": "gradient_checkpointing",
    "version": "FSDP2, which is always used",
    "state_dict_type": "sharded checkpoints, which are always written",
}
HUB_NAMES = tuple(name for name in FIELDS if name.startswith("hub_") and name != "hub_token")


# These may be texts too, which Transformers takes for the path of a file.
JSON_OBJECTS = (
    "model_init_kwargs",
    "dataset_kwargs",
    "lr_scheduler_kwargs",
    "accelerator_config",
    "activation_checkpointing_kwargs",
)
BATCH_KEYS = ("split_batches", "dispatch_batches", "even_batches", "gradient_accumulation_kwargs")
SKIP_PREPARATION = "skip_prepare_dataset"  # TRL's word for what a job does anyway
BACKENDS = ("nccl", "gloo")  # of torch.distributed, in this image
LOADER_SETTINGS = (
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
)
LOW_RANK_OPTIMIZERS = ("galore", "apollo")  # these work on modules that optim_target_modules names


def find_missing_package(optim: str) -> str | None:
    """Return the package that an optimizer needs and that is not installed, or None."""
    package = read_snapshot()["optim"].packages.get(optim)
    return package if package and find_spec(package) is None else None


def fill_optimizers(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the package that the optimizer lacks, and the optimizers that lack none."""
    choices = read_snapshot()["optim"].choices or []
    usable = ", ".join(choice for choice in choices if not find_missing_package(choice))
    yield {"package": find_missing_package(settings.training.optim), "choices": usable}


def find_pattern_fault(targets: str | list[str]) -> str | None:
    """Return why a text is no regular expression; None where it is one, and for a list of names."""
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def refuse_without_loaders(name: str) -> Rule:
    """Return the rule that this setting needs processes that load batches."""
    return Rule(
        (name, "dataloader_num_workers"),
        lambda s: bool(s.value(name)) and not s.training.dataloader_num_workers,
        f"{name}={{{name}}} without dataloader_num_workers: no process loads batches ahead; give it or remove {name}.",
    )


def keep_with_global_batch(name: str, default: bool, reason: str) -> Rule:
    """Return the rule that this setting keeps its default where the job has a global batch."""
    return Rule(
        (name, *TOTALS),
        lambda s: s.value(name) is not default and s.training.is_given(*TOTALS),
        f"{name}={{{name}}} with a global batch: {reason}; remove it.",
    )


def refuse_text(name: str) -> Rule:
    """Return the rule that this setting is a JSON object."""
    return Rule(
        (name,),
        lambda s: isinstance(s.value(name), str),
        f"{name}={{{name}!r}} is not a JSON object: write the name and the value of each argument into one.",
    )


def supports_fsdp(model_settings: ModelSettings, adapter_settings: AdapterSettings, optim: str) -> bool:
    """Tell whether a base that is loaded so, with an adapter that begins so and this optimizer, can be sharded."""
    starts_alike = adapter_settings.init_lora_weights not in UNSHARDABLE_STARTS
    in_8_bit = model_settings.load_in_8bit or model_settings.base_compute == "fp8"
    return not in_8_bit and starts_alike and updates_shards(optim)


def updates_shards(optim: str) -> bool:
    """Tell whether an optimizer updates sharded weights: those of torch do, but for Transformers' own Adafactor."""
    return optim != "adafactor" and optim not in read_snapshot()["optim"].packages


def is_quantized(settings: Settings) -> bool:
    """Tell whether bitsandbytes quantizes the base."""
    return settings.model.load_in_4bit or settings.model.load_in_8bit


def uses_fsdp(settings: Settings) -> bool:
    """Tell whether the user asked for FSDP."""
    return settings.parallelism.distribution == "fsdp"


def names_tracker(settings: Settings, tracker: str) -> bool:
    """Tell whether `report_to` names this tracker."""
    return tracker in (list_named_trackers(settings.tracking) or [])


def is_unknown_address(settings: Settings) -> bool:
    """Tell whether MLflow's address is of no kind that MLflow or its plugin for SageMaker knows."""
    uri = find_mlflow_uri(settings.tracking)
    return uri is not None and not is_mlflow_address(uri)


def fill_address(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield MLflow's address without its password."""
    yield {"uri": hide_secrets(find_mlflow_uri(settings.tracking) or "")}


def fill_fsdp_keys(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield each key of fsdp_config that a user may not set, and what to do in its place."""
    for key in sorted(settings.parallelism.fsdp_config.keys() - REFINABLE):
        name = key.removeprefix("fsdp_")
        fix = f"use {OTHER_WAYS[name]}" if name in OTHER_WAYS else f"it takes {', '.join(sorted(REFINABLE))}"
        yield {"key": key, "fix": fix}


def names_whole_path(wish: str | None) -> bool:
    """Tell whether this value of `resume_from_checkpoint` is one that can be followed wherever the job runs."""
    return not wish or wish.lower() in ("true", "false") or os.path.isabs(wish)


def delays_by_steps(settings: Settings) -> bool:
    """Tell whether `eval_delay` counts steps, as it does where evaluations do. Else it counts epochs."""
    training = settings.training
    return training.eval_strategy == "steps" if training.is_given("eval_strategy") else training.is_given("eval_steps")


def list_best_metrics(method: str) -> list[str]:
    """Return the metrics of a training method by which the best weights can be told."""
    return [name for name in list_objectives(method) if name.startswith("eval_")]


def name_best_metric(name: str | None) -> str:
    """Return the metric that a value of `metric_for_best_model` names, with the prefix that may be left out."""
    return f"eval_{(name or 'loss').removeprefix('eval_')}"


def refuse_without_evaluation(name: str) -> Rule:
    """Return the rule that this setting needs evaluations."""
    return Rule(
        (name, "eval_strategy"),
        lambda s: s.value(name) and s.is_given("eval_strategy") and s.training.eval_strategy == "no",
        f"{name}=true with eval_strategy=no: without evaluations no weights are the best; remove eval_strategy.",
    )


def refuse_quantized_training(name: str) -> Rule:
    """Return the rule that this kind of quantized base is not fine-tuned as a whole."""
    return Rule(
        (name, "use_peft"),
        lambda s: s.value(name) and not s.adapter.use_peft,
        f"{name}=true with use_peft=false: quantized weights cannot be trained themselves; set use_peft=true.",
    )


def refuse_without_4bit(name: str) -> Rule:
    """Return the rule that this setting needs a base in 4 bit."""
    return Rule(
        (name, "load_in_4bit"),
        lambda s: s.is_given(name) and not s.model.load_in_4bit,
        f"{name} without load_in_4bit=true: it would do nothing; set load_in_4bit=true or remove it.",
    )


def refuse_with_float8(name: str, when: Callable[[Settings], bool], reason: str) -> Rule:
    """Return the rule that a base does not multiply in float8 where `when` tells that this setting stands against it.

    The reason ends the sentence, with what to do.
    """
    return Rule(
        ("base_compute", name),
        lambda s: s.model.base_compute == "fp8" and when(s),
        f"base_compute=fp8 with {name}={{{name}}}: {reason}.",
    )


def refuse_model_option(option: str, setting: str) -> Rule:
    """Return the rule that an option of from_pretrained is given by this setting."""
    return Rule(
        ("model_init_kwargs",),
        lambda s: isinstance(s.model.model_init_kwargs, dict) and option in s.model.model_init_kwargs,
        f"model_init_kwargs has {option!r}, which is a setting of its own: give {setting} instead.",
    )


def fill_unsafe_options(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield each option of from_pretrained that a user may not give."""
    for option in UNSAFE_MODEL_OPTIONS:
        if option in (settings.model.model_init_kwargs or {}):
            yield {"option": option}


def refuse_without_push(name: str) -> Rule:
    """Return the rule that this setting needs a push to the Hub."""
    return Rule(
        (name, "push_to_hub"),
        lambda s: s.is_given(name) and not s.output.push_to_hub,
        f"{name} without push_to_hub=true: it would do nothing; set push_to_hub=true, or remove {name}.",
    )


def refuse_without_adapter(name: str) -> Rule:
    """Return the rule that this setting needs an adapter."""
    return Rule(
        (name, "use_peft"),
        lambda s: not s.adapter.use_peft and s.value(name) != FIELDS[name].default,
        f"{name}={{{name}!r}} with use_peft=false: full fine-tuning has no adapter; remove {name}.",
    )


QUANTIZATION_RULES = (
    Rule(
        ("load_in_4bit", "load_in_8bit"),
        lambda s: s.model.load_in_4bit and s.model.load_in_8bit,
        "load_in_4bit=true with load_in_8bit=true: a base has one quantization; set one of them to false.",
    ),
    Rule(
        ("load_in_4bit", "use_mxfp4"),
        lambda s: s.model.load_in_4bit and not s.model.load_in_8bit and bool(s.model.use_mxfp4),
        "load_in_4bit=true with use_mxfp4=true: a base has one quantization; set one of them to false.",
    ),
    Rule(
        ("load_in_8bit", "use_mxfp4"),
        lambda s: s.model.load_in_8bit and not s.model.load_in_4bit and bool(s.model.use_mxfp4),
        "load_in_8bit=true with use_mxfp4=true: a base has one quantization; set one of them to false.",
    ),
    *(refuse_quantized_training(name) for name in ("load_in_4bit", "load_in_8bit")),
    *(refuse_without_4bit(name) for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")),
)

FLOAT8_RULES = (
    refuse_with_float8(
        "use_peft", lambda s: not s.adapter.use_peft, "it is for a base that is frozen; set use_peft=true, or remove it"
    ),
    refuse_with_float8(
        "load_in_4bit", lambda s: s.model.load_in_4bit, "a base is kept in one type; remove one of them"
    ),
    refuse_with_float8(
        "load_in_8bit", lambda s: s.model.load_in_8bit, "a base is kept in one type; remove one of them"
    ),
    refuse_with_float8(
        "torch_dtype",
        lambda s: s.model.torch_dtype in ("float16", "float32"),
        "such products come out in bfloat16; leave torch_dtype out",
    ),
    refuse_with_float8("fp16", lambda s: bool(s.training.fp16), "such products come out in bfloat16; remove fp16"),
    refuse_with_float8(
        "use_dora", lambda s: s.adapter.use_dora, "DoRA reads the base's own weights at each step; remove one of them"
    ),
    refuse_with_float8(
        "init_lora_weights",
        lambda s: s.adapter.init_lora_weights in MOVING_STARTS,
        "it moves a part of the base, in full precision; use default",
    ),
    refuse_with_float8("distribution", uses_fsdp, "matrices in float8 are not sharded; use ddp, or remove it"),
    refuse_with_float8(
        "torch_compile", lambda s: bool(s.training.torch_compile), "the two were not tried together; remove one of them"
    ),
)

MODEL_RULES = (
    *(refuse_text(name) for name in JSON_OBJECTS),
    Rule(
        ("liger_kernel_config", "use_liger_kernel"),
        lambda s: s.model.use_liger_kernel is False and bool(s.model.liger_kernel_config),
        "liger_kernel_config with use_liger_kernel=false: it would do nothing; remove one of them.",
    ),
    Rule(
        ("chat_template_path",),
        lambda s: bool(ADDRESS.match(s.model.chat_template_path or "")),
        "chat_template_path={chat_template_path!r} is an address: give a file or folder of a channel, or a Hugging "
        "Face id.",
    ),
    *(refuse_model_option(option, setting) for option, setting in SETTING_OF_MODEL_OPTION.items()),
    Rule(
        ("model_init_kwargs",),
        lambda s: not {*UNSAFE_MODEL_OPTIONS}.isdisjoint(s.model.model_init_kwargs or {}),
        "model_init_kwargs has {option!r}: it changes which files or code a model is made of, or where it lies, which "
        "the checks and the export rely on; remove it.",
        fill_unsafe_options,
    ),
)

MERGE_RULES = (
    Rule(
        ("merge_weights", "use_peft"),
        lambda s: s.output.merge_weights and not s.adapter.use_peft,
        "merge_weights=true with use_peft=false: full fine-tuning has no adapter to merge; remove merge_weights.",
    ),
    Rule(
        ("merge_base", "merge_weights"),
        lambda s: s.is_given("merge_base") and not s.output.merge_weights,
        "merge_base={merge_base} without merge_weights=true: it would do nothing; remove it.",
    ),
    Rule(
        ("merge_base", "load_in_4bit", "load_in_8bit"),
        lambda s: s.output.merge_weights and s.output.merge_base == "dequantized" and not is_quantized(s),
        "merge_base=dequantized without load_in_4bit or load_in_8bit: the base was not quantized; remove it.",
    ),
    Rule(
        ("merge_base", "init_lora_weights"),
        lambda s: (
            s.output.merge_weights
            and s.output.merge_base == "dequantized"
            and is_quantized(s)
            and s.adapter.init_lora_weights == "loftq"
        ),
        "merge_base=dequantized with init_lora_weights=loftq: its adapter is for the original weights; use bf16.",
    ),
)

PUBLISH_RULES = (
    Rule(
        ("mlflow_register_model", "mlflow_uri"),
        lambda s: bool(s.output.mlflow_register_model) and not find_mlflow_uri(s.tracking),
        "mlflow_register_model={mlflow_register_model!r} without mlflow_uri: give the tracking server.",
    ),
    *(refuse_without_push(name) for name in HUB_NAMES),
    Rule(
        ("push_to_hub", "hub_model_id"),
        lambda s: s.output.push_to_hub and not HUB_ID.fullmatch(s.output.hub_model_id or ""),
        "push_to_hub=true with hub_model_id={hub_model_id}: give a name such as 'organization/name'.",
    ),
    Rule(
        ("push_to_hub", "hub_token", "token"),
        lambda s: (
            s.output.push_to_hub
            and not (s.output.hub_token or s.model.token or any(os.environ.get(name) for name in USED_FOR["hub"]))
        ),
        "push_to_hub=true without a token: give one that may write as HF_TOKEN in the job's Environment.",
    ),
    Rule(
        ("hub_strategy",),
        lambda s: s.output.push_to_hub and s.is_given("hub_strategy") and s.output.hub_strategy != "end",
        "hub_strategy={hub_strategy}: the result is pushed once, at the end; remove it.",
    ),
    Rule(
        ("hub_always_push",),
        lambda s: s.output.push_to_hub and s.output.hub_always_push,
        "hub_always_push=true: the result is pushed once, at the end; remove it.",
    ),
)

ADAPTER_RULES = (
    *(refuse_without_adapter(name) for name in ADAPTER_CHOICES),
    Rule(
        ("adapter_path", "use_peft"),
        lambda s: s.adapter.goes_on and not s.adapter.use_peft,
        "adapter_path={adapter_path!r} with use_peft=false: full fine-tuning has no adapter to go on from; remove "
        "adapter_path, or set merge_adapter=true.",
    ),
    Rule(
        ("merge_adapter", "merge_weights"),
        lambda s: s.adapter.merge_adapter and s.adapter.use_peft and not s.output.merge_weights,
        "merge_adapter=true without merge_weights=true: the new adapter is for the merged model, which the result "
        "would lack; set merge_weights=true.",
    ),
    Rule(
        ("merge_adapter", "use_mxfp4"),
        lambda s: s.adapter.merge_adapter and bool(s.model.use_mxfp4),
        "merge_adapter=true with use_mxfp4=true: the merged model is stored in bfloat16; merge the adapter with "
        "`llm-trainer merge`, and give the result as the model.",
    ),
    Rule(
        ("adapter_revision", "adapter_path"),
        lambda s: bool(s.adapter.adapter_revision) and not s.adapter.adapter_path,
        "adapter_revision={adapter_revision!r} without adapter_path: it would do nothing; give the adapter's Hub id, "
        "or remove it.",
    ),
    Rule(
        ("target_modules",),
        lambda s: find_pattern_fault(s.adapter.target_modules) is not None,
        "target_modules={target_modules!r} is no regular expression ({fault}): mend it, or give a list of names.",
        lambda s: ({"fault": find_pattern_fault(s.adapter.target_modules)},),
    ),
    Rule(
        ("use_dora", "init_lora_weights"),
        lambda s: (
            s.adapter.use_peft and s.adapter.use_dora and s.adapter.init_lora_weights in (*MOVING_STARTS, "loftq")
        ),
        "use_dora=true with init_lora_weights={init_lora_weights}: DoRA begins at the base as it is; use default.",
    ),
    Rule(
        ("init_lora_weights", "load_in_4bit"),
        lambda s: s.adapter.use_peft and s.adapter.init_lora_weights in MOVING_STARTS and s.model.load_in_4bit,
        "init_lora_weights={init_lora_weights} with load_in_4bit=true: it moves a part of the base, in full precision; "
        "use loftq.",
    ),
    Rule(
        ("init_lora_weights", "load_in_8bit"),
        lambda s: (
            s.adapter.use_peft
            and s.adapter.init_lora_weights in MOVING_STARTS
            and s.model.load_in_8bit
            and not s.model.load_in_4bit
        ),
        "init_lora_weights={init_lora_weights} with load_in_8bit=true: it moves a part of the base, in full precision; "
        "use loftq.",
    ),
    Rule(
        ("init_lora_weights", "load_in_4bit"),
        lambda s: s.adapter.use_peft and s.adapter.init_lora_weights == "loftq" and not s.model.load_in_4bit,
        "init_lora_weights=loftq begins with the error of 4-bit weights: set load_in_4bit=true, or use default.",
    ),
    Rule(
        ("init_lora_weights", "lora_r"),
        lambda s: s.adapter.use_peft and s.adapter.init_lora_weights == "orthogonal" and s.adapter.lora_r % 2 == 1,
        "init_lora_weights=orthogonal with lora_r={lora_r}: the rank must be even; add 1.",
    ),
    Rule(
        ("loraplus_lr_ratio", "optim"),
        lambda s: (
            s.adapter.use_peft
            and s.adapter.loraplus_lr_ratio is not None
            and s.training.optim.startswith(OWN_PARAMETER_GROUPS)
        ),
        "loraplus_lr_ratio={loraplus_lr_ratio:g} with optim={optim}: it groups the weights by itself; "
        "use adamw_torch_fused.",
    ),
)

TRAINING_RULES = (
    Rule(
        ("resume_from_checkpoint",),
        lambda s: not names_whole_path(s.training.resume_from_checkpoint),
        "resume_from_checkpoint={resume_from_checkpoint!r} is neither true, false nor a whole path: give one such as "
        "'/opt/ml/checkpoints/checkpoint-100'.",
    ),
    Rule(
        ("optim",),
        lambda s: find_missing_package(s.training.optim) is not None,
        "optim={optim} needs the package {package}, which is not installed: use one of {choices}.",
        fill_optimizers,
    ),
    Rule(
        ("optim", "optim_target_modules"),
        lambda s: (
            s.training.optim.startswith(LOW_RANK_OPTIMIZERS)
            and not s.training.optim_target_modules
            and not find_missing_package(s.training.optim)
        ),
        "optim={optim} without optim_target_modules: name the modules whose gradients it projects, or use "
        "adamw_torch_fused.",
    ),
    Rule(
        ("optim_target_modules", "optim"),
        lambda s: bool(s.training.optim_target_modules) and not s.training.optim.startswith(LOW_RANK_OPTIMIZERS),
        "optim_target_modules with optim={optim}: it would do nothing; remove it.",
    ),
    *(refuse_without_loaders(name) for name in LOADER_SETTINGS),
    *(refuse_without_evaluation(name) for name in ("early_stopping", "load_best_model_at_end")),
    Rule(
        ("metric_for_best_model",),
        lambda s: name_best_metric(s.training.metric_for_best_model) not in list_best_metrics(s.data.method),
        "metric_for_best_model={metric_for_best_model!r} is not valid: it must be among {choices}; leave it out for "
        "eval_loss.",
        lambda s: [{"choices": ", ".join(list_best_metrics(s.data.method))}],
    ),
    Rule(
        ("eval_delay", "max_steps"),
        lambda s: s.training.max_steps > 0 and delays_by_steps(s) and s.training.eval_delay > s.training.max_steps,
        "eval_delay={eval_delay} with max_steps={max_steps}: nothing is ever evaluated; lower eval_delay.",
    ),
    Rule(
        ("eval_delay", "num_train_epochs"),
        lambda s: (
            s.training.max_steps <= 0 and not delays_by_steps(s) and s.training.eval_delay > s.training.num_train_epochs
        ),
        "eval_delay={eval_delay} with num_train_epochs={num_train_epochs}: nothing is ever evaluated; it counts epochs "
        "where each epoch is evaluated; lower it.",
    ),
    Rule(
        ("torch_dtype", "use_peft"),
        lambda s: s.model.torch_dtype == "float16" and not s.adapter.use_peft,
        "torch_dtype=float16 with use_peft=false: float16 weights overflow in training; use bfloat16 or float32.",
    ),
    Rule(
        ("bf16", "fp16"),
        lambda s: s.training.bf16 and s.training.fp16,
        "bf16=true with fp16=true: mixed precision has one type; set one of them to false.",
    ),
    Rule(
        ("enable_jit_checkpoint",),
        lambda s: s.training.enable_jit_checkpoint,
        "enable_jit_checkpoint=true: a stop is saved anyway, by all ranks at the same step; remove it.",
    ),
    Rule(
        ("save_only_model",),
        lambda s: s.training.save_only_model,
        "save_only_model=true: such checkpoints cannot be resumed from; remove it.",
    ),
    Rule(
        ("save_on_each_node",),
        lambda s: s.training.save_on_each_node,
        "save_on_each_node=true: one host writes for all, and a host that lacks a checkpoint gets it; remove it.",
    ),
    Rule(
        ("packing", "max_length"),
        lambda s: bool(s.data.packing) and s.data.max_length is None,
        "packing=true with max_length=null: rows are packed into sequences of max_length tokens; give it.",
    ),
    Rule(
        ("eval_packing", "max_length"),
        lambda s: s.data.eval_packing and not s.data.packing and s.data.max_length is None,
        "eval_packing=true with max_length=null: rows are packed into sequences of max_length tokens; give it.",
    ),
)

TRACKING_RULES = (
    Rule(
        ("report_to",),
        lambda s: not set(list_named_trackers(s.tracking) or []) <= set(TRACKERS),
        f"report_to={{report_to!r}} is not valid: it must be among {', '.join(TRACKERS)}; leave it out.",
    ),
    Rule(
        ("report_to", "mlflow_uri"),
        lambda s: names_tracker(s, "mlflow") and find_mlflow_uri(s.tracking) is None,
        "report_to={report_to!r} without an address: give mlflow_uri, or MLFLOW_TRACKING_URI.",
    ),
    Rule(
        ("mlflow_uri",),
        is_unknown_address,
        "mlflow_uri={uri!r} is no address that MLflow knows: give http(s)://, sqlite:///, a folder, or the ARN of a "
        "SageMaker tracking server or MLflow app (arn:aws:sagemaker:REGION:ACCOUNT:mlflow-tracking-server/NAME, or "
        "mlflow-app/NAME).",
        fill_address,
    ),
    Rule(
        ("report_to", "wandb_token"),
        lambda s: names_tracker(s, "wandb") and not has_wandb_account(s.tracking),
        "report_to={report_to!r} without a W&B key: give WANDB_API_KEY in the job's Environment, or "
        "WANDB_MODE=offline.",
    ),
    Rule(
        ("wandb_project", "run_name", "mlflow_experiment_name", "mlflow_register_model"),
        lambda s: True,
        "{key}={value!r} is no name that {tracker} takes: {fix}.",
        lambda s: find_refused_names(s.tracking, s.output),
    ),
    Rule(
        ("track_model", "mlflow_uri", "wandb_token"),
        lambda s: s.tracking.track_model and not choose_trackers(s.tracking),
        "track_model=true without a tracker: it would do nothing; give mlflow_uri or a W&B key, or remove it.",
    ),
)

STREAMING_RULES = (
    Rule(
        ("streaming", "max_steps"),
        lambda s: s.data.streaming and s.training.max_steps <= 0,
        "streaming=true needs max_steps: how many rows there are is not known before they are read; set it.",
    ),
    Rule(
        ("streaming", "packing"),
        lambda s: s.data.streaming and bool(s.data.packing),
        "packing=true with streaming=true: packing needs the lengths of all rows first; set one of them to false.",
    ),
    Rule(
        ("streaming", "train_sampling_strategy"),
        lambda s: s.data.streaming and s.training.train_sampling_strategy != "random",
        "train_sampling_strategy={train_sampling_strategy} with streaming=true: rows come as they are read, shuffled "
        "in a buffer; leave it out.",
    ),
    Rule(
        ("streaming", "shuffle_dataset"),
        lambda s: s.data.streaming and s.data.shuffle_dataset,
        "shuffle_dataset=true with streaming=true: rows are shuffled in a buffer anyway; remove shuffle_dataset.",
    ),
)

PARALLELISM_RULES = (
    Rule(
        ("parallelism_config",),
        lambda s: s.parallelism.parallelism_config is not None,
        "parallelism_config: a job is spread by distribution=ddp or fsdp, and splits neither layers nor sequences; "
        "remove it.",
    ),
    Rule(
        ("ddp_backend",),
        lambda s: s.parallelism.ddp_backend not in (None, *BACKENDS),
        f"ddp_backend={{ddp_backend}} is not valid: it must be among {', '.join(BACKENDS)}; leave it out.",
    ),
    Rule(
        ("deepspeed",),
        lambda s: s.parallelism.deepspeed is not None,
        "deepspeed is not part of this image: use distribution=fsdp, which shards a model as ZeRO does.",
    ),
    Rule(
        ("fsdp",),
        lambda s: s.parallelism.fsdp is not None,
        "fsdp={fsdp}: write distribution=fsdp; fsdp_config may refine it.",
    ),
    Rule(
        ("fsdp_config", "distribution"),
        lambda s: s.parallelism.fsdp_config is not None and s.parallelism.distribution == "ddp",
        "fsdp_config with distribution=ddp does nothing: set distribution=fsdp, or remove it.",
    ),
    Rule(
        ("fsdp_config",),
        lambda s: s.parallelism.fsdp_config is not None and not isinstance(s.parallelism.fsdp_config, dict),
        "fsdp_config={fsdp_config!r} is not a JSON object: write what it is to refine into it.",
    ),
    Rule(
        ("fsdp_config",),
        lambda s: isinstance(s.parallelism.fsdp_config, dict),
        "fsdp_config: {key!r} is not to be set: {fix}.",
        fill_fsdp_keys,
    ),
    Rule(
        ("load_in_8bit", "distribution"),
        lambda s: uses_fsdp(s) and s.model.load_in_8bit,
        "load_in_8bit=true with distribution=fsdp: 8-bit weights cannot be sharded; use load_in_4bit=true.",
    ),
    Rule(
        ("optim", "distribution"),
        lambda s: uses_fsdp(s) and not updates_shards(s.training.optim) and not find_missing_package(s.training.optim),
        "optim={optim} with distribution=fsdp: it cannot update sharded weights; use adamw_torch_fused.",
    ),
    Rule(
        ("init_lora_weights", "distribution"),
        lambda s: uses_fsdp(s) and s.adapter.init_lora_weights in UNSHARDABLE_STARTS,
        "init_lora_weights={init_lora_weights} with distribution=fsdp: what such an adapter began with cannot be taken "
        "off its shards; use default.",
    ),
    Rule(
        ("activation_offloading", "distribution", "gradient_checkpointing"),
        lambda s: (
            uses_fsdp(s) and bool(s.parallelism.activation_offloading) and s.parallelism.gradient_checkpointing is False
        ),
        "activation_offloading=true with distribution=fsdp and gradient_checkpointing=false would offload gathered "
        "weights: set gradient_checkpointing=true.",
    ),
)

BATCH_RULES = (
    Rule(
        ("global_batch_size", "global_batch_tokens"),
        lambda s: s.training.global_batch_size is not None and s.training.global_batch_tokens is not None,
        "global_batch_size={global_batch_size} with global_batch_tokens={global_batch_tokens}: both say how large a "
        "step is; remove one of them.",
    ),
    Rule(
        ("global_batch_tokens", "packing", "max_length"),
        lambda s: (
            s.training.global_batch_tokens is not None
            and not (s.data.packing and s.data.max_length and s.data.is_given("max_length"))
        ),
        "global_batch_tokens={global_batch_tokens} without packing=true and max_length: only sequences that packing "
        "fills have one length; give both, or global_batch_size.",
    ),
    Rule(
        ("global_batch_tokens", "max_length"),
        lambda s: bool((s.training.global_batch_tokens or 0) % (s.data.max_length or 1)),
        "global_batch_tokens={global_batch_tokens} is no multiple of max_length={max_length}: give {nearest}.",
        lambda s: [{"nearest": show_nearest(s.training.global_batch_tokens or 0, s.data.max_length or 1)}],
    ),
    keep_with_global_batch("dataloader_drop_last", False, "which rows it drops would depend on the devices"),
    keep_with_global_batch("auto_find_batch_size", False, "it would lower the rows of a step"),
    keep_with_global_batch("average_tokens_across_devices", True, "the loss would depend on the devices"),
    Rule(
        ("accelerator_config", *TOTALS),
        lambda s: s.training.is_given(*TOTALS) and isinstance(s.parallelism.accelerator_config, dict),
        "accelerator_config with a global batch: {key!r} would change the rows of a step; leave it out.",
        lambda s: [{"key": key} for key in BATCH_KEYS if key in s.parallelism.accelerator_config],
    ),
    Rule(
        ("min_hosts", "max_restarts"),
        lambda s: s.parallelism.min_hosts is not None and not s.parallelism.max_restarts,
        "min_hosts={min_hosts} without max_restarts: to go on without a lost host is a restart; set max_restarts, to 3 "
        "for example.",
    ),
)

DATA_RULES = (
    Rule(
        ("dataset_kwargs",),
        lambda s: isinstance(s.data.dataset_kwargs, dict) and not s.data.dataset_kwargs.keys() <= {SKIP_PREPARATION},
        "dataset_kwargs={dataset_kwargs}: it would do nothing, since rows are tokenized before TRL sees them; remove "
        "it.",
    ),
    Rule(
        ("train_weights",),
        lambda s: any(weight <= 0 for weight in (s.data.train_weights or {}).values()),
        "train_weights={train_weights} is not valid: each weight must be above 0; leave the channel out.",
    ),
    Rule(
        ("packing_strategy",),
        lambda s: s.data.packing_strategy == "wrapped",
        "packing_strategy=wrapped: it cuts rows and lets them see each other's tokens; use bfd or bfd_split.",
    ),
    Rule(
        ("padding_free", "packing"),
        lambda s: s.data.packing is False and s.data.padding_free,
        "padding_free=true with packing=false: rows are either packed or padded; remove one of them.",
    ),
    Rule(
        ("eval_packing", "packing"),
        lambda s: s.data.packing is False and s.data.eval_packing and not s.data.padding_free,
        "eval_packing=true with packing=false: rows are either packed or padded; remove one of them.",
    ),
)

RULES: tuple[Rule, ...] = (
    *QUANTIZATION_RULES,
    *FLOAT8_RULES,
    *MODEL_RULES,
    *MERGE_RULES,
    *PUBLISH_RULES,
    *ADAPTER_RULES,
    *TRAINING_RULES,
    *TRACKING_RULES,
    *STREAMING_RULES,
    *PARALLELISM_RULES,
    *BATCH_RULES,
    *DATA_RULES,
    *METHOD_RULES,
    *DISTILLATION_RULES,
    *GENERATION_RULES,
)
