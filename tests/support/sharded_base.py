# SPDX-License-Identifier: Apache-2.0
"""Prints what each of two CPU processes quantizes, and whether it holds the shards of what one would have quantized."""

import os
import sys

import bitsandbytes.functional
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import SFTConfig

from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.loading import load_model
from llm_trainer.model.plan import PlanSettings, plan_model
from llm_trainer.model.precision import choose_precision
from llm_trainer.training.sharding import fsdp

RANKS = 2


class CountedQuantizations:
    """bitsandbytes' `quantize_4bit`, and how often it was called for a matrix."""

    def __init__(self):
        self.quantize, self.count = bitsandbytes.functional.quantize_4bit, 0

    def __call__(self, *arguments, **options):
        self.count += 1
        return self.quantize(*arguments, **options)


def compare_shards(rank: int, folder: str, base: str, bf16: bool) -> None:
    """Load and shard a base as a job does, and then load it as one process does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # Accelerate asks for them, and nobody uses them
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    settings, device = Settings(load_in_4bit=True, bf16=bf16), Device(torch.device("cpu"))
    sections = PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output)
    plan = plan_model(base, sections, device, choose_precision(settings.model, settings.adapter, device))
    options = fsdp.choose_arguments(None)
    arguments = SFTConfig(folder, use_cpu=True, bf16=bf16, ddp_backend="gloo", report_to="none", **options)
    fsdp.reduce_in_float32(arguments)
    fsdp.allow_cpu_ranks()

    bitsandbytes.functional.quantize_4bit = counted = CountedQuantizations()
    loaded = fsdp.load_base_for_sharding(plan, settings.model, arguments, dist.group.WORLD)
    count, counted.count = counted.count, 0
    model = get_peft_model(loaded, LoraConfig(target_modules="all-linear"))
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=True, fsdp_plugin=plugin)
    fsdp.expose_packed_weights(model, torch.device("cpu"))
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(adapter))
    alone = load_model(base, settings.model, plan.load_options, torch.device("cpu"))
    compare_weights(model, alone)
    compare_scales(model, alone)
    sys.stdout.write(f"rank {rank} quantized {count} of {counted.count} matrices\n")  # in one piece, as both write
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


def compare_weights(model: nn.Module, alone: nn.Module) -> None:
    """Raise AssertionError where frozen weights, put together from their shards, have other bytes."""
    whole = {rename(name): weight.full_tensor() for name, weight in model.named_parameters() if "lora" not in name}
    expected = dict(alone.named_parameters())
    assert whole.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(whole[name].view(torch.uint8), weight.data.view(torch.uint8)), name


def compare_scales(model: nn.Module, alone: nn.Module) -> None:
    """Raise AssertionError where the scales of 4-bit layers differ."""
    states = {rename(name): layer.quant_state for name, layer in model.named_modules() if is_packed(layer)}
    expected = {name: layer.quant_state for name, layer in alone.named_modules() if is_packed(layer)}
    assert states.keys() == expected.keys()
    for name, state in expected.items():
        ours, theirs = states[name].as_dict(packed=True), state.as_dict(packed=True)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys()), name


def is_packed(layer: nn.Module) -> bool:
    """Tell a layer of bitsandbytes from PEFT's around it."""
    return isinstance(layer, Linear4bit)


def rename(name: str) -> str:
    """Return a name as it is without the adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(compare_shards, args=(*sys.argv[1:3], "bf16" in sys.argv), nprocs=RANKS)
