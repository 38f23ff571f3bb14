# SPDX-License-Identifier: Apache-2.0
"""FSDP2: torch's `fully_shard`, used by Accelerate. Each rank holds a shard of the weights and of the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, fsdp_utils
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig

from llm_trainer.common.ranks import rank
from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.kinds.tower import list_tower
from llm_trainer.model.loading import load_model
from llm_trainer.model.lora import find_base_model
from llm_trainer.model.plan import ModelPlan
from llm_trainer.model.quantization import build_packed_weight, list_packed_layers, quantize_on

LOAD = fsdp_utils.fsdp2_load_full_state_dict


def choose_arguments(fsdp_config: dict[str, Any] | None) -> dict[str, Any]:
    """Return TrainingArguments' values for a sharded run. `fsdp_config` is the user's, and wins.

    Accelerate's activation checkpointing is not used, though Transformers recommends it. Its layers drop out other
    numbers when they are computed again than before, which falsifies the gradients. PEFT no longer finds the adapter in
    them, and saves none.

    Gradients go to their shards after each batch. Accelerate would keep all of a model's gradients whole on every
    device until the last of the batches whose gradients accumulate.
    """
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # a unit is a decoder layer
        "state_dict_type": "SHARDED_STATE_DICT",  # each rank writes its shard; no rank holds a whole optimizer
        "cpu_ram_efficient_loading": True,  # rank 0 alone has the weights, and sends the others their shards
    }
    return {
        "fsdp": True,
        "fsdp_config": {**config, **(fsdp_config or {})},
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def reduce_in_float32(arguments: SFTConfig) -> None:
    """Have FSDP2 sum the ranks' gradients in float32, as DDP does. Arguments of a run without FSDP stay as they are.

    Accelerate would sum them in the type of the computation. The sum of many ranks' gradients loses small ones there.
    """
    if arguments.fsdp_plugin_args is None:
        return
    mixed = find_mixed_dtype(arguments)
    policy = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32, output_dtype=mixed)
    arguments.fsdp_plugin_args["mixed_precision_policy"] = policy


def find_mixed_dtype(arguments: SFTConfig) -> torch.dtype | None:
    """Return the type of the computation where it differs from the weights' by the arguments bf16 and fp16."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def allow_cpu_ranks() -> None:
    """Have Accelerate shard over CPU ranks too. Its state takes the FSDP plugin only where it finds accelerators.

    It looks at the type of distribution that all its states share, once, when the trainer makes its Accelerator. The
    training arguments have chosen the device and the gloo backend before.
    """
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def name_units(arguments: SFTConfig, base: PreTrainedModel) -> None:
    """Have FSDP2 shard each block of a tower by itself, too, as it does a decoder layer. Units that a user names stay.

    Classes that a model's own list names and that it does not have would end the run.
    """
    tower = {name.rpartition(".")[0] for name in list_tower(base)}
    if not tower or arguments.fsdp_plugin_args is None:
        return
    existing = {type(module).__name__ for module in base.modules()}
    blocks = {
        type(module).__name__
        for name, module in base.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and any(each.startswith(f"{name}.") for each in tower)
    }
    units = sorted(blocks | existing.intersection(base._no_split_modules or ()))
    arguments.fsdp_plugin_args.setdefault("transformer_cls_names_to_wrap", units)
    # It has no option for it, and looks beside the decoder.
    fsdp_utils._find_final_norm = find_last_norm


def find_last_norm(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    """Return the norm below a model's output layer, which Accelerate makes one unit with it, or None.

    TRL's loss reads the output layer without calling it. It gets its weights when the norm is called. Else the ranks'
    gradients of these weights would not be added up.
    """
    base = find_base_model(model)
    places = (base.base_model, base.get_decoder())
    norms = [child for place in places for child in place.children() if "Norm" in type(child).__name__]
    return norms[-1] if norms else None


def set_quantized_storage_dtype(quantization: object, arguments: SFTConfig, dtype: torch.dtype) -> None:
    """Store 4-bit weights in tensors of the type that FSDP computes in: it shards floats, and casts other types."""
    if isinstance(quantization, BitsAndBytesConfig):
        quantization.bnb_4bit_quant_storage = find_mixed_dtype(arguments) or dtype


def load_base_for_sharding(
    plan: ModelPlan, settings: ModelSettings, arguments: SFTConfig, group: dist.ProcessGroup
) -> PreTrainedModel:
    """Return the base on the CPU, from where Accelerate shards it tensor by tensor. Every rank must call this.

    The first rank alone loads the base, and later sends the others their shards. It also quantizes alone, on its device
    if that is a GPU.
    """
    set_quantized_storage_dtype(plan.quantization, arguments, plan.precision.compute)
    device = torch.device("cpu") if rank() == 0 else None
    with quantize_on(plan.device.torch) if settings.load_in_4bit else nullcontext():
        base = load_model(plan.folder, settings, plan.load_options, device)
    receive_structure(base, group)
    name_units(arguments, base)
    fsdp_utils.fsdp2_load_full_state_dict = load_with_buffers
    return base


def receive_structure(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Make a model without weights ready to get rank 0's from Accelerate. Every rank must call this.

    It gets the number types, since a checkpoint may keep some weights in float32. It gets the buffers, such as the
    frequencies of rotary positions, and the scales of 4-bit layers. Its weights get addresses, by which Accelerate
    tells them apart, but no memory: the system gives that only to pages that are written to.
    """
    layers = list(list_packed_layers(model))
    sent: list[Any] = [{name: parameter.dtype for name, parameter in model.named_parameters()}]
    sent.append(dict(model.named_buffers()))
    dist.broadcast_object_list(sent, src=0, group=group)
    if model.device.type == "meta":
        for layer in layers:
            layer.weight = None  # until its packed shape is known
        allocate(model, *sent)
    for layer in layers:
        receive_packed_layer(layer, group)


def allocate(model: PreTrainedModel, types: dict[str, torch.dtype], buffers: dict[str, torch.Tensor]) -> None:
    """Give a model on the meta device weights of these types on the CPU, and buffers."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
    model.to_empty(device="cpu")
    model.tie_weights()
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, buffer)


def load_with_buffers(accelerator: Any, model: nn.Module, whole: dict[str, torch.Tensor], **options: Any) -> Any:
    """Give a sharded model its weights as Accelerate does, which takes all that is saved for shards.

    Buffers that are saved are whole on each rank, such as Gemma 4's scales of layers and DeepSeek's biases of experts.
    """
    buffers = {name: whole[name].to(accelerator.device) for name, _ in model.named_buffers() if name in whole}
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in buffers}
    for module, own_name in places.values():
        module._non_persistent_buffers_set.add(own_name)
    loaded = LOAD(accelerator, model, whole, **options)
    for name, (module, own_name) in places.items():
        module.register_buffer(own_name, buffers[name])
    return loaded


def receive_packed_layer(layer: nn.Module, group: dist.ProcessGroup) -> None:
    """Give a 4-bit layer rank 0's scales, and its weight the packed shape. Every rank must call this.

    Layers come one by one, as the scales of a large model together are gigabytes.
    """
    weight = layer.weight
    sent: list[Any] = [weight is not None and (weight.shape, weight.dtype, weight.quant_state.as_dict(packed=True))]
    dist.broadcast_object_list(sent, src=0, group=group)
    if weight is None:
        shape, dtype, scales = sent[0]
        layer.weight = build_packed_weight(torch.empty(shape, dtype=dtype), scales, layer)


def expose_packed_weights(model: nn.Module, device: torch.device) -> None:
    """Make 4-bit weights plain parameters, which Accelerate sends and shards as any other.

    It does not send bitsandbytes' own, which carry their scales. The scales stay in the layers, whole on each device.
    bitsandbytes finds them there.
    """
    for layer in list_packed_layers(model):
        layer.quant_state = layer.weight.quant_state
        layer.quant_state.to(device)
        layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)


def gather_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the trained weights whole in rank 0's memory: the adapter's, or all. Other ranks get none.

    They are gathered tensor by tensor, and no device holds more than one of them. Every rank must call this.
    """
    trained_only = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)


@contextmanager
def hold_whole(model: Any, reshards: bool) -> Iterator[None]:
    """Have each rank hold all weights while the model generates, in place of gathering them again for each token.

    Ranks may therefore write texts of different lengths: after the first token none waits for another. `reshards` is
    what a forward pass does outside. A model that is not sharded stays as it is.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    register_fsdp_forward_method(model, "generate")  # which goes past the model's own forward method
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        del model.generate
        model.set_reshard_after_forward(reshards)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
