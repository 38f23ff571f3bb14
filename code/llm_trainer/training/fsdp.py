# SPDX-License-Identifier: Apache-2.0
"""FSDP2 (torch's `fully_shard`, by way of Accelerate): each rank holds a shard of the weights and of the optimizer."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.modeling import get_non_persistent_buffers
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import SFTConfig

from llm_trainer.common.ranks import rank
from llm_trainer.config.schema import Settings
from llm_trainer.model.loading import load_model
from llm_trainer.model.plan import ModelPlan


def choose_arguments(settings: Settings) -> dict[str, Any]:
    """SFTConfig's arguments for a sharded run.

    Not Accelerate's activation checkpointing, though Transformers recommends it: its layers drop out other numbers when
    they are computed again than before, which falsifies the gradients, and PEFT no longer finds the adapter in them,
    and saves none.

    Gradients go to their shards after each batch. Accelerate would keep them whole until the last of the batches whose
    gradients accumulate: all of a model's gradients on every device.
    """
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # a unit is a decoder layer
        "state_dict_type": "SHARDED_STATE_DICT",  # each rank writes its shard; no rank holds a whole optimizer
        "cpu_ram_efficient_loading": not settings.model.load_in_4bit,  # of 4-bit weights Accelerate sends none
    }
    return {
        "fsdp": True,
        "fsdp_config": {**config, **(settings.parallelism.fsdp_config or {})},
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def allow_cpu_ranks() -> None:
    """Have Accelerate shard over CPU ranks too: its state takes the FSDP plugin only where it finds accelerators.

    It looks at the type of distribution that all its states share, once, when the trainer makes its Accelerator. The
    device and the gloo backend have been settled before, by the training arguments.
    """
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def store_as_float(quantization: object, arguments: SFTConfig, dtype: torch.dtype) -> None:
    """Have 4-bit weights lie in tensors of the type that FSDP computes in: it shards floats, and casts other ones."""
    if isinstance(quantization, BitsAndBytesConfig):
        mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else dtype
        quantization.bnb_4bit_quant_storage = mixed


def load_base(plan: ModelPlan, settings: Settings, arguments: SFTConfig, group: dist.ProcessGroup) -> PreTrainedModel:
    """The base on the CPU, from where Accelerate shards it layer by layer. Every rank must call this.

    The first rank loads it, and sends the others their shards of it. 4-bit weights are loaded, and quantized, by every
    rank on the CPU: Accelerate shards each layer when it moves it to the device, but cannot send a quantized one.
    """
    store_as_float(plan.quantization, arguments, plan.precision.compute)
    device = torch.device("cpu") if settings.model.load_in_4bit or rank() == 0 else None
    base = load_model(plan.folder, settings.model, plan.load_options, device)
    fill_in(base, group)
    return base


def fill_in(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Make a model without weights ready to be sent them by Accelerate, after rank 0's. Every rank must call this.

    It gets the types, of which a checkpoint may keep some in float32, and the buffers that are never saved, such as the
    frequencies of rotary positions. Its weights get addresses, by which Accelerate tells them apart, but no memory:
    the system gives that to pages that are written to.
    """
    buffers = {name: model.get_buffer(name) for name in get_non_persistent_buffers(model, recurse=True, fqns=True)}
    sent: list[Any] = [{name: parameter.dtype for name, parameter in model.named_parameters()}, buffers]
    dist.broadcast_object_list(sent, src=0, group=group)
    if model.device.type != "meta":
        return
    types, buffers = sent
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
    model.to_empty(device="cpu")
    model.tie_weights()
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        model.get_submodule(module).register_buffer(own_name, buffer, persistent=False)


def gather_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """What was trained, whole, in rank 0's memory: the adapter, or all weights; nothing on the other ranks.

    It goes tensor by tensor, so that no device holds more than one of them. Every rank must call this.
    """
    trained_only = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)
