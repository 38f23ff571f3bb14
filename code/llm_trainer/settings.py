# SPDX-License-Identifier: Apache-2.0
"""What the user asked for: defaults, then YAML file, then hyperparameters, then command line; the last one wins.

One pydantic model holds our own settings and every field of `trl.SFTConfig`. Every mistake is found before any of
them is reported.
"""

import difflib
import json
import math
import os
import re
import types as pytypes
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from llm_trainer.decoding import decode
from llm_trainer.environment import Environment
from llm_trainer.errors import shorten
from llm_trainer.redaction import REDACTED, URL_PASSWORD
from llm_trainer.tracking import find_mlflow_uri, find_tracking_contradictions
from llm_trainer.training_arguments import Argument, read_snapshot

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DatasetFormat = Literal["auto", "pretokenized", "messages", "sharegpt", "prompt_completion", "alpaca", "text"]
Attention = Literal[
    "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention", "sdpa", "eager"
]
AdapterInit = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq"]


class OwnSettings(BaseModel):
    """The settings that are this project's own; SFTConfig's fields join them in `Settings`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True)

    config: str | None = Field(None, description="YAML file with settings; default: the one in channel `config`.")
    # Model
    model_id: str | None = Field(None, description="Hub id or model folder; default: the folder of channel `model`.")
    model_revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    use_snapshot_download: bool = Field(True, description="Download a Hub model once a host, before any rank loads it.")
    token: SecretStr | None = Field(
        None, description="Hugging Face token, or a secret's ARN; better given as HF_TOKEN in Environment."
    )
    torch_dtype: Dtype = Field(
        "auto", description="Type of the weights and of the computation; auto: by the device (16 bit on a GPU)."
    )
    attn_implementation: Attention = Field(
        "auto", description="Attention kernel; auto: the fastest one that is right for model, type and device."
    )
    use_liger_kernel: bool | None = Field(
        None, description="Liger's fused kernels; default: on a GPU, where Liger knows the model."
    )
    load_in_4bit: bool = Field(False, description="QLoRA: load the base in 4 bit.")
    load_in_8bit: bool = Field(False, description="Load the base in 8 bit (LLM.int8()).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit type of `load_in_4bit`.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantize the scales of `load_in_4bit` too.")
    use_mxfp4: bool | None = Field(
        None, description="The base is an MXFP4 checkpoint (gpt-oss), dequantized for training; default: as it says."
    )
    # Adapter
    use_peft: bool = Field(True, description="Train a LoRA adapter; false: fine-tune all weights.")
    lora_r: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: float = Field(16, gt=0, description="LoRA scale; the adapter's output is multiplied by alpha / rank.")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "auto", description="Modules that get an adapter: names, or a regex; auto: all linear layers and all experts."
    )
    target_parameters: list[str] | None = Field(
        None, description="Parameters that get an adapter, such as fused experts; default: with `auto`, all experts."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Learn magnitude and direction apart (DoRA).")
    init_lora_weights: AdapterInit = Field(
        "default", description="How the adapter begins; loftq: with what 4 bit lose."
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="Learning rate of the adapter's B over that of A (LoRA+); default: the same."
    )
    merge_weights: bool = Field(False, description="Write the merged model, and the adapter beside it.")
    merge_base: Literal["bf16", "dequantized"] = Field(
        "bf16",
        description="What a QLoRA adapter is merged into: the original weights, or what quantization made of them.",
    )
    # Data
    train_dataset_path: str | None = Field(
        None, description="Training file, folder or Hub data set; default: channel `train`, or all named `train_...`."
    )
    val_dataset_path: str | None = Field(
        None, description="The same for validation; default: channel `validation` or `val`, if there is one."
    )
    dataset_config: str | None = Field(None, description="Configuration of a Hub data set.")
    dataset_train_split: str = Field("train", description="Split of a Hub data set that is trained on.")
    dataset_test_split: str = Field("test", description="Split of a Hub data set that is evaluated on.")
    dataset_format: DatasetFormat = Field("auto", description="Kind of rows; auto: by their fields.")
    text_field: str = Field("text", min_length=1, description="Field that holds a row's text.")
    messages_field: str = Field("messages", min_length=1, description="Field that holds a row's conversation.")
    max_length: int | None = Field(
        2048, ge=2, description="Longest row in tokens; `null`: no limit. Tokens, not characters."
    )
    apply_truncation: bool = Field(True, description="Cut rows longer than `max_length`; false: leave them out.")
    assistant_only_loss: bool | None = Field(
        None, description="Train on what the assistant says; default: in conversations whose template tells the turns."
    )
    train_weights: dict[str, float] | None = Field(
        None, description="Share of each training channel in the rows of an epoch; default: each row once."
    )
    max_bad_rows_fraction: float = Field(
        0, ge=0, lt=1, description="Rows that may be bad before the job stops; they are left out and listed."
    )
    streaming: bool = Field(
        False, description="Tokenize while training, without a copy on disk; needs `max_steps`, and takes no `packing`."
    )
    dataset_num_proc: int | None = Field(None, ge=1, description="Processes a host to tokenize with; default: cores.")
    packing: bool | None = Field(
        None,
        description="Rows share sequences instead of being padded; default: those of a batch, where the model keeps "
        "them apart; true: those of the whole data set, and a batch counts sequences of `max_length` tokens.",
    )
    # Run
    output_dir: str | None = Field(None, description="Where the final artefacts go; default: /opt/ml/model.")
    checkpoint_dir: str | None = Field(None, description="Where checkpoints go; default: /opt/ml/checkpoints.")
    use_checkpoints: bool = Field(
        True, description="Save checkpoints, ten times a run unless `save_steps` says otherwise, and resume from them."
    )
    max_run_seconds: int | None = Field(
        None, ge=1, description="Save, export and end before this time is over; give the job's MaxRuntimeInSeconds."
    )
    max_restarts: int = Field(0, ge=0, description="Restarts from the newest checkpoint after a worker has died.")
    host_timeout_seconds: int = Field(
        900, ge=1, description="How long to wait at the start for the other hosts of the job."
    )
    early_stopping: bool = Field(False, description="Stop when eval_loss no longer falls, and keep the best weights.")
    early_stopping_patience: int = Field(3, ge=1, description="Evaluations without a fall before stopping.")
    distribution: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="A copy of the model a GPU (ddp) or shards of it (fsdp); auto: fsdp where a copy cannot fit.",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass, to save memory; default: where it is needed."
    )
    activation_offloading: bool | None = Field(
        None, description="Keep activations in the host's memory until the backward pass; default: where it is needed."
    )
    check_memory: bool = Field(
        True, description="Stop before the weights load if the estimate says that the job cannot fit; false: try it."
    )
    nproc_per_node: int | None = Field(
        None, ge=1, description="Worker processes a host; default: one a GPU, or one on a CPU."
    )
    # Tracking
    mlflow_uri: str | None = Field(None, description="MLflow tracking server; switches MLflow on.")
    mlflow_experiment_name: str | None = Field(None, description="MLflow experiment.")
    mlflow_register_model: str | None = Field(
        None, min_length=1, description="Name under which the result is registered in MLflow; default: it is not."
    )
    wandb_project: str | None = Field(None, description="Weights & Biases project; switches it on.")
    wandb_token: SecretStr | None = Field(
        None, description="W&B key, or a secret's ARN; better given as WANDB_API_KEY in Environment."
    )
    track_model: bool = Field(False, description="Upload what is exported to the trackers as an artefact, too.")
    sample_prompts: int = Field(
        3, ge=0, description="Held-out prompts whose answers, before and after the training, the report shows."
    )


# The field's other spellings of the same thing.
ALIASES = {
    "MaxRuntimeInSeconds": "max_run_seconds",
    "activation_checkpointing": "gradient_checkpointing",
    "dataset_name": "train_dataset_path",
    "dataset_text_field": "text_field",
    "dtype": "torch_dtype",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "max_seq_length": "max_length",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "model_name_or_path": "model_id",
    "warmup_ratio": "warmup_steps",  # a share below 1 in both, since Transformers 5
}

# Names from other tools that no spelling distance finds.
SYNONYMS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "dataset": "train_dataset_path",
    "base_model": "model_id",
    "micro_batch_size": "per_device_train_batch_size",
}

# SFTConfig states no ranges; these would otherwise fail late, or never.
RANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"gt": 0},
    "num_train_epochs": {"gt": 0},
    "per_device_train_batch_size": {"ge": 1},
    "per_device_eval_batch_size": {"ge": 1},
    "gradient_accumulation_steps": {"ge": 1},
    "warmup_steps": {"ge": 0},
    "weight_decay": {"ge": 0},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"gt": 0},
    "max_grad_norm": {"ge": 0},
    "label_smoothing_factor": {"ge": 0, "lt": 1},
    "logging_steps": {"gt": 0},
    "eval_steps": {"gt": 0},
    "save_steps": {"gt": 0},
    "save_total_limit": {"ge": 1},
    "dataloader_num_workers": {"ge": 0},
    "ddp_timeout": {"ge": 1},
    "seed": {"ge": 0},
}

# What asks for an adapter of a certain kind. Its sizes are no such thing: a recipe may hold them and switch it off.
ADAPTER_CHOICES = (
    "target_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
)
MOVING_STARTS = ("pissa", "pissa_niter_16", "olora")  # move a part of the base into the adapter
OWN_PARAMETER_GROUPS = ("galore", "lomo", "adalomo", "apollo")  # optimizers that do not take the trainer's
# What Transformers' from_pretrained calls it, and we choose.
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
# What may be changed of how FSDP2 shards; the rest is what checkpoints, loading and export rely on.
REFINABLE = frozenset({"reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"})
OTHER_WAYS = {
    "activation_checkpointing": "gradient_checkpointing",
    "version": "FSDP2, which is always used",
    "state_dict_type": "sharded checkpoints, which are always written",
}

SECRETS = ("token", "wandb_token", "hub_token")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PLAIN_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}


def build_settings_model() -> type[OwnSettings]:
    """OwnSettings plus every field of SFTConfig that is not among them, by its own name and type."""
    fields: dict[str, Any] = {
        name: (field_type(name, argument), Field(argument.default, description=argument.help, **RANGES.get(name, {})))
        for name, argument in read_snapshot().items()
        if name not in OwnSettings.model_fields and name not in ALIASES
    }
    return create_model("Settings", __base__=OwnSettings, **fields)


def field_type(name: str, argument: Argument) -> Any:
    if name in SECRETS:
        return SecretStr | None
    if argument.choices:
        kinds: list[Any] = [Literal[tuple(argument.choices)]]
    else:
        kinds = [PLAIN_TYPES[kind] for kind in argument.types]
    if argument.nullable:
        kinds.append(None)
    return typing.Union[tuple(kinds)]  # noqa: UP007 - built from a list


if typing.TYPE_CHECKING:

    class Settings(OwnSettings):
        """OwnSettings, with SFTConfig's fields as attributes."""

        def __getattr__(self, name: str) -> Any: ...
else:
    Settings = build_settings_model()


def plain_types(name: str) -> tuple[frozenset[str], bool]:
    """The names of the plain types that a setting takes, and whether it takes null."""
    names: set[str] = set()
    nullable = False
    for part in union_parts(Settings.model_fields[name].annotation):
        origin = typing.get_origin(part) or part
        if part is type(None):
            nullable = True
        else:
            names.add("str" if origin in (Literal, SecretStr) else origin.__name__)
    return frozenset(names), nullable


def union_parts(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, pytypes.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def read_settings(environment: Environment, arguments: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings, and a sentence for every mistake in them; a mistaken setting is left at its default.

    `arguments` are the settings given on the command line.
    """
    problems: list[str] = []
    given = {**environment.hyperparameters, **arguments}
    asked = rename(read_yaml(find_config_file(environment, given), problems), "YAML key", problems)
    asked |= rename(given, "Hyperparameter", problems)
    values = {}
    for name, raw in asked.items():
        types, nullable = plain_types(name)
        value = decode(raw, types, nullable) if isinstance(raw, str) else raw
        if value is None and not nullable:
            continue  # null asks for the default
        problem = find_problem(name, value, raw)
        if problem:
            problems.append(problem)
        else:
            values[name] = value
    settings = Settings(**values)
    return settings, problems + list(find_contradictions(settings))


def find_config_file(environment: Environment, given: Mapping[str, Any]) -> Path | None:
    """The YAML file that `config` names, or the one in the channel of that name."""
    if given.get("config"):
        return Path(decode(str(given["config"]), frozenset({"str"}), nullable=True))
    return environment.channels.get("config")


def read_yaml(path: Path | None, problems: list[str]) -> dict[str, Any]:
    """The settings in a YAML file, or in the only YAML file of a folder."""
    if path is None:
        return {}
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            problems.append(
                f"config: {path} must hold exactly one .yaml file but has {names}: name one with config=PATH."
            )
            return {}
        path = files[0]
    try:
        with path.open(encoding="utf-8") as file:
            value = yaml.safe_load(file)  # given the text itself, its errors would quote a line, which can hold a token
    except FileNotFoundError:
        problems.append(f"config={str(path)!r} does not exist: give the path of a YAML file in a channel.")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        problems.append(
            f"{path} is not readable YAML ({' '.join(str(error).split())}): write it as `key: value` lines."
        )
        return {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds a YAML {type(value).__name__}: write it as `key: value` lines.")
        return {}
    return value


def rename(given: Mapping[Any, Any], source: str, problems: list[str]) -> dict[str, Any]:
    """The given values under the settings' own names. Unknown names and clashing aliases become problems."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        key = str(key)
        if key.startswith("sagemaker_") or key == "_tuning_objective_metric":
            continue  # SageMaker's own
        name = ALIASES.get(key, key)
        if name not in Settings.model_fields:
            problems.append(f"{source} {key!r} is not a setting: {nearest(key, valid_names())}")
        elif name != key and name in given:
            problems.append(f"{source}s {key!r} and {name!r} are the same setting given twice: remove {key!r}.")
        else:
            values[name] = value
    return values


def valid_names() -> list[str]:
    return [*Settings.model_fields, *ALIASES]


def nearest(key: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    name = SYNONYMS.get(key.lower()) or (close[0] if close else None)
    if name:
        return f"the nearest valid name is {name!r}."
    return "remove it (`llm-trainer train --help` lists the valid names)."


def find_problem(name: str, value: Any, raw: Any) -> str | None:
    """One sentence when the value breaks the field's rule: key, value as it was given, rule, fix."""
    field = Settings.model_fields[name]
    adapter = TypeAdapter[Any](Annotated[field.annotation, field], config=Settings.model_config)  # type: ignore[arg-type]
    is_stray_bool = isinstance(value, bool) and "bool" not in plain_types(name)[0]
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    try:
        adapter.validate_python(value)
    except ValidationError:
        pass
    else:
        if not (is_stray_bool or is_infinite):
            return None
    shown = REDACTED if name in SECRETS else shorten(repr(raw))
    return f"{name}={shown} is not valid: it must be {describe_rule(field)}; {suggest(field, value)}"


def describe_rule(field: FieldInfo) -> str:
    """What the field takes, e.g. "a number, at least 0 and below 1"."""
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
    words |= {"dict": "a JSON object", "list": "a list"}
    kinds = []
    for part in union_parts(field.annotation):
        origin = typing.get_origin(part) or part
        if origin is Literal:
            kinds.append("one of " + ", ".join(typing.get_args(part)))
        elif part is type(None):
            kinds.append("null")
        else:
            kinds.append("a text" if origin is SecretStr else words[origin.__name__])
    comparisons = {"ge": "at least", "gt": "above", "lt": "below", "min_length": "of a length of at least"}
    bounds = [
        f"{phrase} {getattr(constraint, key):g}"
        for constraint in field.metadata
        for key, phrase in comparisons.items()
        if getattr(constraint, key, None) is not None
    ]
    rule = " or ".join(kinds)
    return f"{rule}, {' and '.join(bounds)}" if bounds else rule


def suggest(field: FieldInfo, value: Any) -> str:
    choices = [str(choice) for part in union_parts(field.annotation) for choice in typing.get_args(part)]
    longer = [choice for choice in choices if choice.startswith(str(value))]
    close = longer or difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    if close and value != "":
        return f"the nearest is {close[0]!r}."
    return "leave it out for none." if field.default is None else f"its default is {show(field.default)}."


def show(value: Any) -> str:
    """A value the way a user writes it."""
    return str(value).lower() if isinstance(value, bool) or value is None else repr(value)


def find_contradictions(settings: Settings) -> typing.Iterator[str]:
    """Settings that are each valid but cannot hold together."""
    yield from find_quantization_contradictions(settings)
    if settings.use_liger_kernel is False and settings.liger_kernel_config:
        yield "liger_kernel_config with use_liger_kernel=false: it would do nothing; remove one of them."
    for name, own in SETTING_OF_MODEL_OPTION.items():
        if name in (settings.model_init_kwargs or {}):
            yield f"model_init_kwargs has {name!r}, which is a setting of its own: give {own} instead."
    yield from find_merge_contradictions(settings)
    yield from find_publish_contradictions(settings)
    yield from find_adapter_contradictions(settings)
    if settings.torch_dtype == "float16" and not settings.use_peft:
        yield "torch_dtype=float16 with use_peft=false: float16 weights overflow in training; use bfloat16 or float32."
    if settings.bf16 and settings.fp16:
        yield "bf16=true with fp16=true: mixed precision has one type; set one of them to false."
    if settings.enable_jit_checkpoint:
        yield "enable_jit_checkpoint=true: a stop is saved anyway, by all ranks at the same step; remove it."
    if settings.save_only_model:
        yield "save_only_model=true: such checkpoints cannot be resumed from; remove it."
    if settings.save_on_each_node:
        yield "save_on_each_node=true: one host writes for all, and a host that lacks a checkpoint gets it; remove it."
    if (settings.packing or settings.eval_packing) and settings.max_length is None:
        name = "packing" if settings.packing else "eval_packing"
        yield f"{name}=true with max_length=null: rows are packed into sequences of max_length tokens; give it."
    yield from find_tracking_contradictions(settings)
    if settings.streaming:
        yield from find_stream_contradictions(settings)
    yield from find_distribution_contradictions(settings)
    weights = settings.train_weights or {}
    if any(weight <= 0 for weight in weights.values()):
        yield f"train_weights={json.dumps(weights)} is not valid: each weight must be above 0; leave the channel out."
    if settings.packing_strategy == "wrapped":
        yield "packing_strategy=wrapped: it cuts rows and lets them see each other's tokens; use bfd or bfd_split."
    if settings.packing is False and (settings.padding_free or settings.eval_packing):
        other = "padding_free" if settings.padding_free else "eval_packing"
        yield f"{other}=true with packing=false: rows are either packed or padded; remove one of them."


def find_lacks(settings: Settings, environment: Environment) -> typing.Iterator[str]:
    """What the settings ask for and the job's machines, as they are seen from here, do not have."""
    if settings.attn_implementation not in ("auto", "sdpa", "eager") and not environment.num_gpus:
        yield (
            f"attn_implementation={settings.attn_implementation} runs only on an NVIDIA GPU and there is none here: "
            "leave it out."
        )
    if settings.activation_offloading and (settings.use_cpu or not environment.num_gpus):
        yield "activation_offloading=true without a GPU: activations are in the host's memory anyway; remove it."
    if settings.distribution == "fsdp" and count_processes(settings, environment) * len(environment.hosts) == 1:
        yield (
            "distribution=fsdp with one process: there is nobody to share the model with; "
            "remove it, or use more GPUs or hosts."
        )
    if environment.num_gpus and (settings.nproc_per_node or 0) > environment.num_gpus and not settings.use_cpu:
        yield (
            f"nproc_per_node={settings.nproc_per_node} is more than this host's {environment.num_gpus} GPUs: "
            "leave it out to use them all."
        )


def find_adapter_contradictions(settings: Settings) -> typing.Iterator[str]:
    init = settings.init_lora_weights
    if not settings.use_peft:
        for name in ADAPTER_CHOICES:
            if getattr(settings, name) != Settings.model_fields[name].default:
                value = getattr(settings, name)
                yield f"{name}={show(value)} with use_peft=false: full fine-tuning has no adapter; remove {name}."
        return
    if settings.use_dora and init in (*MOVING_STARTS, "loftq"):
        yield f"use_dora=true with init_lora_weights={init}: DoRA begins at the base as it is; use default."
    packed = "load_in_4bit" if settings.load_in_4bit else "load_in_8bit" if settings.load_in_8bit else None
    if packed and init in MOVING_STARTS:
        yield f"init_lora_weights={init} with {packed}=true: it moves a part of the base, in full precision; use loftq."
    if init == "loftq" and not settings.load_in_4bit:
        yield "init_lora_weights=loftq begins with the error of 4-bit weights: set load_in_4bit=true, or use default."
    if init == "orthogonal" and settings.lora_r % 2:
        yield f"init_lora_weights=orthogonal with lora_r={settings.lora_r}: the rank must be even; add 1."
    if settings.loraplus_lr_ratio and settings.optim.startswith(OWN_PARAMETER_GROUPS):
        yield (
            f"loraplus_lr_ratio={settings.loraplus_lr_ratio:g} with optim={settings.optim}: it groups the weights by "
            "itself; use adamw_torch_fused."
        )


def find_merge_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.merge_weights and not settings.use_peft:
        yield "merge_weights=true with use_peft=false: full fine-tuning has no adapter to merge; remove merge_weights."
    if is_given(settings, "merge_base") and not settings.merge_weights:
        yield f"merge_base={settings.merge_base} without merge_weights=true: it would do nothing; remove it."
    elif settings.merge_base == "dequantized" and not (settings.load_in_4bit or settings.load_in_8bit):
        yield "merge_base=dequantized without load_in_4bit or load_in_8bit: the base was not quantized; remove it."
    elif settings.merge_base == "dequantized" and settings.init_lora_weights == "loftq":
        yield "merge_base=dequantized with init_lora_weights=loftq: its adapter is for the original weights; use bf16."


def find_publish_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.mlflow_register_model and not find_mlflow_uri(settings):
        yield f"mlflow_register_model={settings.mlflow_register_model!r} without mlflow_uri: give the tracking server."
    names = [name for name in Settings.model_fields if name.startswith("hub_") and name != "hub_token"]
    given = [name for name in names if is_given(settings, name)]
    if not settings.push_to_hub:
        for name in given:
            yield f"{name} without push_to_hub=true: it would do nothing; set push_to_hub=true, or remove {name}."
        return
    if not HUB_ID.fullmatch(settings.hub_model_id or ""):
        yield (
            f"push_to_hub=true with hub_model_id={settings.hub_model_id or 'null'}: give a name such as "
            "'organization/name'."
        )
    if not (settings.hub_token or settings.token or os.environ.get("HF_TOKEN")):
        yield "push_to_hub=true without a token: give one that may write as HF_TOKEN in the job's Environment."
    if "hub_strategy" in given and settings.hub_strategy != "end":
        yield f"hub_strategy={settings.hub_strategy}: the result is pushed once, at the end; remove it."
    if settings.hub_always_push:
        yield "hub_always_push=true: the result is pushed once, at the end; remove it."


def find_quantization_contradictions(settings: Settings) -> typing.Iterator[str]:
    asked = [name for name in ("load_in_4bit", "load_in_8bit", "use_mxfp4") if getattr(settings, name)]
    if len(asked) > 1:
        yield f"{asked[0]}=true with {asked[1]}=true: a base has one quantization; set one of them to false."
    for name in ("load_in_4bit", "load_in_8bit"):
        if name in asked and not settings.use_peft:
            yield f"{name}=true with use_peft=false: quantized weights cannot be trained themselves; set use_peft=true."
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if is_given(settings, name) and not settings.load_in_4bit:
            yield f"{name} without load_in_4bit=true: it would do nothing; set load_in_4bit=true or remove it."


def find_stream_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.max_steps <= 0:
        yield "streaming=true needs max_steps: how many rows there are is not known before they are read; set it."
    if settings.packing:
        yield "packing=true with streaming=true: packing needs the lengths of all rows first; set one of them to false."
    if settings.train_sampling_strategy != "random":
        yield (
            f"train_sampling_strategy={settings.train_sampling_strategy} with streaming=true: rows come as they are "
            "read, shuffled in a buffer; leave it out."
        )
    if settings.shuffle_dataset:
        yield "shuffle_dataset=true with streaming=true: rows are shuffled in a buffer anyway; remove shuffle_dataset."


def count_processes(settings: Settings, environment: Environment) -> int:
    """Worker processes on this host: one a GPU, or one on a CPU, unless the user says otherwise."""
    num_gpus = 0 if settings.use_cpu else environment.num_gpus
    return settings.nproc_per_node or num_gpus or 1


def find_distribution_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.deepspeed is not None:
        yield "deepspeed is not part of this image: use distribution=fsdp, which shards a model as ZeRO does."
    if settings.fsdp is not None:
        yield f"fsdp={settings.fsdp}: write distribution=fsdp; fsdp_config may refine it."
    if settings.fsdp_config is not None:
        yield from find_fsdp_config_problems(settings)
    if settings.distribution != "fsdp":
        return
    yield from find_unshardable(settings)
    if settings.activation_offloading and settings.gradient_checkpointing is False:
        yield (
            "activation_offloading=true with distribution=fsdp and gradient_checkpointing=false would offload gathered "
            "weights: set gradient_checkpointing=true."
        )


def find_unshardable(settings: Settings) -> typing.Iterator[str]:
    if settings.load_in_8bit:
        yield "load_in_8bit=true with distribution=fsdp: 8-bit weights cannot be sharded; use load_in_4bit=true."
    if settings.init_lora_weights in (*MOVING_STARTS, "loftq"):
        yield (
            f"init_lora_weights={settings.init_lora_weights} with distribution=fsdp: what such an adapter began with "
            "cannot be taken off its shards; use default."
        )


def find_fsdp_config_problems(settings: Settings) -> typing.Iterator[str]:
    if settings.distribution == "ddp":
        yield "fsdp_config with distribution=ddp does nothing: set distribution=fsdp, or remove it."
    if not isinstance(settings.fsdp_config, dict):
        yield f"fsdp_config={settings.fsdp_config!r} is not a JSON object: write what it is to refine into it."
        return
    for key in sorted(settings.fsdp_config.keys() - REFINABLE):
        name = key.removeprefix("fsdp_")
        fix = f"use {OTHER_WAYS[name]}." if name in OTHER_WAYS else f"it takes {', '.join(sorted(REFINABLE))}."
        yield f"fsdp_config: {key!r} is not to be set: {fix}"


def redact(settings: Settings) -> dict[str, Any]:
    """The settings that were asked for and our own defaults, fit for a log or a manifest."""
    names = [name for name in Settings.model_fields if name in OwnSettings.model_fields or is_given(settings, name)]
    return {name: redact_value(name, getattr(settings, name)) for name in names}


def redact_value(name: str, value: Any) -> Any:
    if name in SECRETS and value is not None:
        return REDACTED
    return URL_PASSWORD.sub(REDACTED, value) if isinstance(value, str) else value


def is_given(settings: Settings, name: str) -> bool:
    """Whether the user set this, as opposed to it being at its default."""
    return name in settings.model_fields_set
