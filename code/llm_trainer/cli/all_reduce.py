# SPDX-License-Identifier: Apache-2.0
"""The worker of the doctor's self-test, which sums a tensor over all ranks, and measures the bandwidth of that.

Its argument is the backend: nccl over GPUs, gloo over CPU processes.
"""

import sys
import time

import torch
from torch import distributed

from llm_trainer.common.errors import UserError
from llm_trainer.model.device import find_device

TENSOR_BYTES = 64 * 2**20
REPEATS = 10


def main(backend: str) -> int:
    """Check the sum, and print the bus bandwidth in GB/s. Return the exit code: 1 where the sum is wrong."""
    device = torch.device("cpu")
    if backend == "nccl":
        try:
            device = find_device(use_cpu=False).torch
        except UserError as problem:
            print(f"Error: {problem}", file=sys.stderr)
            return 1
        torch.cuda.set_device(device)
    distributed.init_process_group(backend)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    tensor = torch.full((TENSOR_BYTES // 4,), rank + 1.0, device=device)
    distributed.all_reduce(tensor)
    right_sum = world_size * (world_size + 1) / 2
    if not torch.all(tensor == right_sum):
        print(f"Error: rank {rank} got {tensor[0].item()} as the sum, and {right_sum} is right", file=sys.stderr)
        return 1
    seconds = time_all_reduce(tensor.zero_())
    if rank == 0:
        # NVIDIA's nccl-tests count it so: what each link carries, whatever the number of ranks
        bus_bytes = 2 * (world_size - 1) / world_size * TENSOR_BYTES
        print(f"bus_gb_per_second={bus_bytes / seconds / 1e9:.2f}")
    distributed.destroy_process_group()
    return 0


def time_all_reduce(tensor: torch.Tensor) -> float:
    """Return the seconds that an all-reduce takes, the mean of several."""
    started = time.perf_counter()
    for _ in range(REPEATS):
        distributed.all_reduce(tensor)
    tensor.sum().item()  # to wait for the device
    return (time.perf_counter() - started) / REPEATS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
