# SPDX-License-Identifier: Apache-2.0
"""Settings that are each valid but contradict each other, or the machine."""

import json
import os
import typing

from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import FIELDS, Settings, show
from llm_trainer.config.sections import HUB_ID, MOVING_STARTS, ParallelismSettings
from llm_trainer.config.tracker_choice import find_mlflow_uri, find_tracking_contradictions

# What asks for an adapter of a certain kind. Its sizes are no such thing: a recipe may hold them and switch it off.
ADAPTER_CHOICES = (
    "target_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
)
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


def find_contradictions(settings: Settings) -> typing.Iterator[str]:
    """Settings that are each valid but cannot hold together."""
    yield from find_quantization_contradictions(settings)
    if settings.model.use_liger_kernel is False and settings.model.liger_kernel_config:
        yield "liger_kernel_config with use_liger_kernel=false: it would do nothing; remove one of them."
    for name, own in SETTING_OF_MODEL_OPTION.items():
        if name in (settings.model.model_init_kwargs or {}):
            yield f"model_init_kwargs has {name!r}, which is a setting of its own: give {own} instead."
    yield from find_merge_contradictions(settings)
    yield from find_publish_contradictions(settings)
    yield from find_adapter_contradictions(settings)
    if settings.model.torch_dtype == "float16" and not settings.adapter.use_peft:
        yield "torch_dtype=float16 with use_peft=false: float16 weights overflow in training; use bfloat16 or float32."
    if settings.training.bf16 and settings.training.fp16:
        yield "bf16=true with fp16=true: mixed precision has one type; set one of them to false."
    if settings.training.enable_jit_checkpoint:
        yield "enable_jit_checkpoint=true: a stop is saved anyway, by all ranks at the same step; remove it."
    if settings.training.save_only_model:
        yield "save_only_model=true: such checkpoints cannot be resumed from; remove it."
    if settings.training.save_on_each_node:
        yield "save_on_each_node=true: one host writes for all, and a host that lacks a checkpoint gets it; remove it."
    if (settings.data.packing or settings.data.eval_packing) and settings.data.max_length is None:
        name = "packing" if settings.data.packing else "eval_packing"
        yield f"{name}=true with max_length=null: rows are packed into sequences of max_length tokens; give it."
    yield from find_tracking_contradictions(settings)
    if settings.data.streaming:
        yield from find_stream_contradictions(settings)
    yield from find_distribution_contradictions(settings)
    weights = settings.data.train_weights or {}
    if any(weight <= 0 for weight in weights.values()):
        yield f"train_weights={json.dumps(weights)} is not valid: each weight must be above 0; leave the channel out."
    if settings.data.packing_strategy == "wrapped":
        yield "packing_strategy=wrapped: it cuts rows and lets them see each other's tokens; use bfd or bfd_split."
    if settings.data.packing is False and (settings.data.padding_free or settings.data.eval_packing):
        other = "padding_free" if settings.data.padding_free else "eval_packing"
        yield f"{other}=true with packing=false: rows are either packed or padded; remove one of them."


def find_missing_hardware(settings: Settings, environment: Environment) -> typing.Iterator[str]:
    """What the settings ask for and the job's machines, as they are seen from here, do not have."""
    if settings.model.attn_implementation not in ("auto", "sdpa", "eager") and not environment.num_gpus:
        yield (
            f"attn_implementation={settings.model.attn_implementation} runs only on an NVIDIA GPU and there is none "
            "here: leave it out."
        )
    if settings.parallelism.activation_offloading and (settings.parallelism.use_cpu or not environment.num_gpus):
        yield "activation_offloading=true without a GPU: activations are in the host's memory anyway; remove it."
    if (
        settings.parallelism.distribution == "fsdp"
        and count_processes(settings.parallelism, environment) * len(environment.hosts) == 1
    ):
        yield (
            "distribution=fsdp with one process: there is nobody to share the model with; "
            "remove it, or use more GPUs or hosts."
        )
    if (
        environment.num_gpus
        and (settings.parallelism.nproc_per_node or 0) > environment.num_gpus
        and not settings.parallelism.use_cpu
    ):
        yield (
            f"nproc_per_node={settings.parallelism.nproc_per_node} is more than this host's "
            f"{environment.num_gpus} GPUs: leave it out to use them all."
        )


def find_adapter_contradictions(settings: Settings) -> typing.Iterator[str]:
    init = settings.adapter.init_lora_weights
    if not settings.adapter.use_peft:
        for name in ADAPTER_CHOICES:
            if settings.value(name) != FIELDS[name].default:
                value = settings.value(name)
                yield f"{name}={show(value)} with use_peft=false: full fine-tuning has no adapter; remove {name}."
        return
    if settings.adapter.use_dora and init in (*MOVING_STARTS, "loftq"):
        yield f"use_dora=true with init_lora_weights={init}: DoRA begins at the base as it is; use default."
    packed = "load_in_4bit" if settings.model.load_in_4bit else "load_in_8bit" if settings.model.load_in_8bit else None
    if packed and init in MOVING_STARTS:
        yield f"init_lora_weights={init} with {packed}=true: it moves a part of the base, in full precision; use loftq."
    if init == "loftq" and not settings.model.load_in_4bit:
        yield "init_lora_weights=loftq begins with the error of 4-bit weights: set load_in_4bit=true, or use default."
    if init == "orthogonal" and settings.adapter.lora_r % 2:
        yield f"init_lora_weights=orthogonal with lora_r={settings.adapter.lora_r}: the rank must be even; add 1."
    if settings.adapter.loraplus_lr_ratio and settings.training.optim.startswith(OWN_PARAMETER_GROUPS):
        yield (
            f"loraplus_lr_ratio={settings.adapter.loraplus_lr_ratio:g} with optim={settings.training.optim}: it groups "
            "the weights by itself; use adamw_torch_fused."
        )


def find_merge_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.output.merge_weights and not settings.adapter.use_peft:
        yield "merge_weights=true with use_peft=false: full fine-tuning has no adapter to merge; remove merge_weights."
    if settings.is_given("merge_base") and not settings.output.merge_weights:
        yield f"merge_base={settings.output.merge_base} without merge_weights=true: it would do nothing; remove it."
    elif settings.output.merge_base == "dequantized" and not (
        settings.model.load_in_4bit or settings.model.load_in_8bit
    ):
        yield "merge_base=dequantized without load_in_4bit or load_in_8bit: the base was not quantized; remove it."
    elif settings.output.merge_base == "dequantized" and settings.adapter.init_lora_weights == "loftq":
        yield "merge_base=dequantized with init_lora_weights=loftq: its adapter is for the original weights; use bf16."


def find_publish_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.output.mlflow_register_model and not find_mlflow_uri(settings):
        yield (
            f"mlflow_register_model={settings.output.mlflow_register_model!r} without mlflow_uri: give the tracking "
            "server."
        )
    names = [name for name in FIELDS if name.startswith("hub_") and name != "hub_token"]
    given = [name for name in names if settings.is_given(name)]
    if not settings.output.push_to_hub:
        for name in given:
            yield f"{name} without push_to_hub=true: it would do nothing; set push_to_hub=true, or remove {name}."
        return
    if not HUB_ID.fullmatch(settings.output.hub_model_id or ""):
        yield (
            f"push_to_hub=true with hub_model_id={settings.output.hub_model_id or 'null'}: give a name such as "
            "'organization/name'."
        )
    if not (settings.output.hub_token or settings.model.token or os.environ.get("HF_TOKEN")):
        yield "push_to_hub=true without a token: give one that may write as HF_TOKEN in the job's Environment."
    if "hub_strategy" in given and settings.output.hub_strategy != "end":
        yield f"hub_strategy={settings.output.hub_strategy}: the result is pushed once, at the end; remove it."
    if settings.output.hub_always_push:
        yield "hub_always_push=true: the result is pushed once, at the end; remove it."


def find_quantization_contradictions(settings: Settings) -> typing.Iterator[str]:
    asked = [name for name in ("load_in_4bit", "load_in_8bit", "use_mxfp4") if settings.value(name)]
    if len(asked) > 1:
        yield f"{asked[0]}=true with {asked[1]}=true: a base has one quantization; set one of them to false."
    for name in ("load_in_4bit", "load_in_8bit"):
        if name in asked and not settings.adapter.use_peft:
            yield f"{name}=true with use_peft=false: quantized weights cannot be trained themselves; set use_peft=true."
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if settings.is_given(name) and not settings.model.load_in_4bit:
            yield f"{name} without load_in_4bit=true: it would do nothing; set load_in_4bit=true or remove it."


def find_stream_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.training.max_steps <= 0:
        yield "streaming=true needs max_steps: how many rows there are is not known before they are read; set it."
    if settings.data.packing:
        yield "packing=true with streaming=true: packing needs the lengths of all rows first; set one of them to false."
    if settings.training.train_sampling_strategy != "random":
        yield (
            f"train_sampling_strategy={settings.training.train_sampling_strategy} with streaming=true: rows come as "
            "they are read, shuffled in a buffer; leave it out."
        )
    if settings.data.shuffle_dataset:
        yield "shuffle_dataset=true with streaming=true: rows are shuffled in a buffer anyway; remove shuffle_dataset."


def count_processes(settings: ParallelismSettings, environment: Environment) -> int:
    """Count the worker processes on this host: one a GPU, or one on a CPU, unless the user says otherwise."""
    num_gpus = 0 if settings.use_cpu else environment.num_gpus
    return settings.nproc_per_node or num_gpus or 1


def find_distribution_contradictions(settings: Settings) -> typing.Iterator[str]:
    if settings.parallelism.deepspeed is not None:
        yield "deepspeed is not part of this image: use distribution=fsdp, which shards a model as ZeRO does."
    if settings.parallelism.fsdp is not None:
        yield f"fsdp={settings.parallelism.fsdp}: write distribution=fsdp; fsdp_config may refine it."
    if settings.parallelism.fsdp_config is not None:
        yield from find_fsdp_config_problems(settings)
    if settings.parallelism.distribution != "fsdp":
        return
    yield from find_unshardable(settings)
    if settings.parallelism.activation_offloading and settings.parallelism.gradient_checkpointing is False:
        yield (
            "activation_offloading=true with distribution=fsdp and gradient_checkpointing=false would offload gathered "
            "weights: set gradient_checkpointing=true."
        )


def find_unshardable(settings: Settings) -> typing.Iterator[str]:
    if settings.model.load_in_8bit:
        yield "load_in_8bit=true with distribution=fsdp: 8-bit weights cannot be sharded; use load_in_4bit=true."
    if settings.adapter.init_lora_weights in (*MOVING_STARTS, "loftq"):
        yield (
            f"init_lora_weights={settings.adapter.init_lora_weights} with distribution=fsdp: what such an adapter "
            "began with cannot be taken off its shards; use default."
        )


def find_fsdp_config_problems(settings: Settings) -> typing.Iterator[str]:
    if settings.parallelism.distribution == "ddp":
        yield "fsdp_config with distribution=ddp does nothing: set distribution=fsdp, or remove it."
    if not isinstance(settings.parallelism.fsdp_config, dict):
        yield (
            f"fsdp_config={settings.parallelism.fsdp_config!r} is not a JSON object: write what it is to refine into "
            "it."
        )
        return
    for key in sorted(settings.parallelism.fsdp_config.keys() - REFINABLE):
        name = key.removeprefix("fsdp_")
        fix = f"use {OTHER_WAYS[name]}." if name in OTHER_WAYS else f"it takes {', '.join(sorted(REFINABLE))}."
        yield f"fsdp_config: {key!r} is not to be set: {fix}"
