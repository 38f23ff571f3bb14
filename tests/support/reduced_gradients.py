# SPDX-License-Identifier: Apache-2.0
"""Prints the gradient that FSDP2 has summed over two CPU processes, one of which adds little to the other's."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from trl import SFTConfig

from llm_trainer.training.sharding import fsdp

ADDENDS = (1.0, 2.0**-9)  # of the ranks; bfloat16 has 8 bits, so that their sum there is the first one
BATCHES = 3


class Model(torch.nn.Sequential):
    """A layer whose gradient is its input."""

    _no_split_modules: tuple[str, ...] = ()


def sum_gradients(rank: int, folder: str) -> None:
    """Compute a few batches in bfloat16 with the arguments of a sharded job. Rank 0 prints policy and gradient."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(ADDENDS))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # Accelerate asks for them, and nobody uses them
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(ADDENDS))
    options = fsdp.choose_arguments(None)
    arguments = SFTConfig(folder, use_cpu=True, bf16=True, ddp_backend="gloo", report_to="none", **options)
    fsdp.reduce_in_float32(arguments)
    fsdp.allow_cpu_ranks()
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, fsdp_plugin=plugin)
    model = Model(torch.nn.Linear(2, 2, bias=False))
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    for _ in range(BATCHES):
        accelerator.backward(model(torch.full((1, 2), ADDENDS[rank])).sum())
    gradient = model[0].weight.grad.full_tensor()
    if rank == 0:
        print(plugin.mixed_precision_policy.reduce_dtype, gradient.unique().tolist(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(sum_gradients, args=(sys.argv[1],), nprocs=len(ADDENDS))
