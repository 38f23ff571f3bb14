# SPDX-License-Identifier: Apache-2.0
"""A count of what keeps a GPU or other ranks waiting within the steps of a training, without a GPU."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

# On a GPU, the host waits for the numbers that these operations return, or for the number of their results.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
TENSOR_READS = ("tolist", "cpu", "numpy")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "barrier")


class Waits(TorchDispatchMode):
    """Counts reads and collectives while `is_on`."""

    def __init__(self):
        super().__init__()
        self.is_on, self.found = False, Counter()

    def count(self, name):
        if self.is_on:
            self.found[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in INDEXED and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in READS or by_mask:
            self.count(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_waits():
    """Count from the beginning of each step to the place where its line would be logged.

    Batches are made before they are on a device. Gradients are reduced by a function that is counted, too.
    """
    waits = Waits()

    def counted(function, name):
        return lambda *args, **kwargs: waits.count(name) or function(*args, **kwargs)

    def switched(function, is_on):
        def call(*args, **kwargs):
            waits.is_on = is_on
            return function(*args, **kwargs)

        return call

    def make_visible(self, *args, init=DistributedDataParallel.__init__, **kwargs):
        init(self, *args, **kwargs)
        self.register_comm_hook(None, allreduce_hook)

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(getattr(dist, name), name))
        for name in TENSOR_READS:
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), name))
        patch.setattr(DistributedDataParallel, "__init__", make_visible)
        patch.setattr(Trainer, "_get_num_items_in_batch", switched(Trainer._get_num_items_in_batch, True))
        patch.setattr(Trainer, "_maybe_log_save_evaluate", switched(Trainer._maybe_log_save_evaluate, False))
        with waits:
            yield waits
