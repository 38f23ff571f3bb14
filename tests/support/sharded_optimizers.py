# SPDX-License-Identifier: Apache-2.0
"""Prints which optimizers update weights that FSDP2 has sharded over two CPU processes."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer
from trl import SFTConfig

from llm_trainer.config.rules.table import find_missing_package
from llm_trainer.config.trl_config_fields import read_snapshot

WORLD_SIZE, WIDTH = 2, 128  # bitsandbytes keeps the state of small layers in 32 bit


def try_optimizers(rank: int, folder: str) -> None:
    """Take two steps with each installed optimizer. Rank 0 prints the names of those that can."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for optim in read_snapshot()["optim"].choices:
        if find_missing_package(optim):
            continue
        layer = fully_shard(torch.nn.Linear(WIDTH, WIDTH), mesh=mesh)
        arguments = SFTConfig(folder, optim=optim, use_cpu=True, report_to="none", bf16=False)
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
            optimizer = kind(layer.parameters(), **options)
            for _ in range(2):
                layer(torch.ones(1, WIDTH)).sum().backward()
                optimizer.step()
        except (RuntimeError, NotImplementedError):
            continue
        if rank == 0:
            print(optim, flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(try_optimizers, args=(sys.argv[1],), nprocs=WORLD_SIZE)
